//! Lookup of `.proto` files by symbol, for server reflection.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet};

/// Descriptors that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("the descriptors are no FileDescriptorSet: {0}")]
pub struct NotDescriptors(#[from] prost::DecodeError);

/// Files by name and by symbol.
#[derive(Debug, Default)]
pub struct Symbols {
    files: BTreeMap<String, Bytes>,
    /// Full names, and the file of each.
    symbols: BTreeMap<String, String>,
}

impl Symbols {
    /// Reads encoded `FileDescriptorSet`s. A file that is in several is taken from the first.
    ///
    /// # Errors
    /// When one is not a `FileDescriptorSet`.
    pub fn new(sets: &[&[u8]]) -> Result<Self, NotDescriptors> {
        let mut all = Self::default();
        for set in sets {
            for file in FileDescriptorSet::decode(*set)?.file {
                if !all.files.contains_key(file.name()) {
                    all.add(&file);
                }
            }
        }
        Ok(all)
    }

    /// The encoded `FileDescriptorProto` of this name.
    #[must_use]
    pub fn file(&self, name: &str) -> Option<Bytes> {
        self.files.get(name).cloned()
    }

    /// The encoded `FileDescriptorProto` of the file that describes a service, method, message, field or enum.
    #[must_use]
    pub fn containing(&self, symbol: &str) -> Option<Bytes> {
        self.file(self.symbols.get(symbol)?)
    }

    fn add(&mut self, file: &FileDescriptorProto) {
        self.files.insert(file.name().to_owned(), file.encode_to_vec().into());
        let package = file.package();
        for message in &file.message_type {
            self.message(file, package, message);
        }
        for one in &file.enum_type {
            self.enumeration(file, package, one);
        }
        for service in &file.service {
            let name = self.symbol(file, package, service.name());
            for method in &service.method {
                self.symbol(file, &name, method.name());
            }
        }
    }

    fn message(&mut self, file: &FileDescriptorProto, within: &str, message: &DescriptorProto) {
        let name = self.symbol(file, within, message.name());
        for field in &message.field {
            self.symbol(file, &name, field.name());
        }
        for oneof in &message.oneof_decl {
            self.symbol(file, &name, oneof.name());
        }
        for one in &message.enum_type {
            self.enumeration(file, &name, one);
        }
        for nested in &message.nested_type {
            self.message(file, &name, nested);
        }
    }

    fn enumeration(&mut self, file: &FileDescriptorProto, within: &str, one: &EnumDescriptorProto) {
        let name = self.symbol(file, within, one.name());
        for value in &one.value {
            self.symbol(file, &name, value.name());
        }
    }

    fn symbol(&mut self, file: &FileDescriptorProto, within: &str, name: &str) -> String {
        let full = if within.is_empty() { name.to_owned() } else { format!("{within}.{name}") };
        self.symbols.insert(full.clone(), file.name().to_owned());
        full
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DESCRIPTORS;

    #[test]
    fn what_is_described_is_found_with_its_file() {
        let symbols = Symbols::new(&[DESCRIPTORS, DESCRIPTORS]).unwrap();
        let file =
            |bytes: Option<Bytes>| FileDescriptorProto::decode(bytes.unwrap()).unwrap().name().to_owned();
        for symbol in [
            "muster.v1.Inference",
            "muster.v1.Inference.Generate",
            "muster.v1.GenerateRequest",
            "muster.v1.GenerateRequest.max_tokens",
            "muster.v1.Finished.Reason",
            "muster.v1.Finished.Reason.REASON_STOP",
        ] {
            assert_eq!(file(symbols.containing(symbol)), "muster/v1/inference.proto", "{symbol}");
        }
        assert_eq!(file(symbols.file("muster/v1/inference.proto")), "muster/v1/inference.proto");
        assert!(symbols.containing("muster.v1.Nothing").is_none() && symbols.file("x.proto").is_none());
        assert!(Symbols::new(&[b"\xff\xff\xff"]).is_err());
    }
}
