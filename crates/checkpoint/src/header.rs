//! The header of a safetensors file: an 8-byte little-endian length, then a JSON object that names every tensor.
//!
//! Stricter than the format's own library. What always holds of a parsed header: no key comes twice, every dtype is
//! known and takes whole bytes, every shape times its dtype is exactly its span, and the spans cover the data from its
//! first byte to its last without gap or overlap. Public so that a fuzzer can drive it; knows nothing about files.

use std::collections::HashSet;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::untrusted::clip;

/// Bytes before the JSON text.
pub const PREFIX: u64 = 8;
/// Longest JSON text that is read, bytes; the format's own limit.
pub const LONGEST_HEADER: u64 = 100_000_000;
/// Most tensors of one file.
pub const MOST_TENSORS: usize = 500_000;
/// Most dimensions of one tensor.
pub const MOST_DIMENSIONS: usize = 8;
/// Longest tensor name, bytes.
pub const LONGEST_NAME: usize = 512;
/// Most bytes of keys and values under `__metadata__`.
pub const LONGEST_METADATA: usize = 1 << 20;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub element: Element,
    /// Its dimensions, at most [`MOST_DIMENSIONS`]; none is a single number, and with one of 0 there is no element.
    pub shape: Vec<usize>,
    /// First byte, counted from the end of the header.
    pub begin: u64,
    /// One past its last byte.
    pub end: u64,
}

/// Element types of the format that take whole bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// A byte with four bits of exponent and three of mantissa.
    F8E4M3,
    /// A byte.
    U8,
    /// Any other, by the name the format gives it and its size in bytes.
    Other(&'static str, u64),
}

impl Element {
    fn parse(name: &str) -> Option<Self> {
        const OTHERS: [(&str, u64); 11] = [
            ("BOOL", 1),
            ("I8", 1),
            ("F8_E5M2", 1),
            ("F8_E8M0", 1),
            ("I16", 2),
            ("U16", 2),
            ("I32", 4),
            ("U32", 4),
            ("F64", 8),
            ("I64", 8),
            ("U64", 8),
        ];
        match name {
            "F32" => Some(Self::F32),
            "BF16" => Some(Self::Bf16),
            "F16" => Some(Self::F16),
            "F8_E4M3" => Some(Self::F8E4M3),
            "U8" => Some(Self::U8),
            _ => {
                OTHERS.iter().find(|(known, _)| *known == name).map(|&(known, size)| Self::Other(known, size))
            }
        }
    }

    /// Bytes per element.
    #[must_use]
    pub const fn size(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::F8E4M3 | Self::U8 => 1,
            Self::Other(_, size) => size,
        }
    }

    /// As the format spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F8E4M3 => "F8_E4M3",
            Self::U8 => "U8",
            Self::Other(name, _) => name,
        }
    }
}

/// Why a header is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not even room for the length.
    #[error("{0} bytes long, too short for a safetensors file; the download may be incomplete")]
    TooShort(u64),
    /// The length does not fit the file, is over the limit, or is zero.
    #[error("header claims {claimed} bytes; allowed are 2 to {allowed} in this file")]
    Length {
        /// What the first eight bytes say.
        claimed: u64,
        /// The most it could be.
        allowed: u64,
    },
    /// Not the JSON it should be.
    #[error("header is not valid: {0}")]
    Json(String),
    /// One entry is wrong in itself.
    #[error("tensor `{tensor}`: {reason}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// Bytes that belong to no tensor, or to two.
    #[error("tensor `{tensor}` begins at data byte {begin}, but the tensor before it ends at {expected}")]
    NotContiguous {
        /// Its name.
        tensor: String,
        /// Where it begins.
        begin: u64,
        /// Where it should.
        expected: u64,
    },
    /// The tensors end before or after the file does.
    #[error(
        "header describes {described} bytes of data, the file has {present}; the file is truncated or damaged"
    )]
    Cover {
        /// End of the last tensor.
        described: u64,
        /// Bytes after the header.
        present: u64,
    },
}

/// Length of the JSON text, from the first eight bytes of a file of `file_length` bytes.
///
/// # Errors
/// When it is less than 2, more than [`LONGEST_HEADER`], or more than the file has.
pub fn json_length(first: [u8; 8], file_length: u64) -> Result<usize, HeaderError> {
    let present = file_length.checked_sub(PREFIX).ok_or(HeaderError::TooShort(file_length))?;
    let claimed = u64::from_le_bytes(first);
    let allowed = present.min(LONGEST_HEADER);
    match usize::try_from(claimed) {
        Ok(length) if length >= 2 && claimed <= allowed => Ok(length),
        _ => Err(HeaderError::Length { claimed, allowed }),
    }
}

/// The tensors that the JSON text `json` describes, in the order of their bytes. `data_length` bytes follow it.
///
/// # Errors
/// When the header breaks any of the rules at the top of this module.
pub fn parse(json: &[u8], data_length: u64) -> Result<Vec<TensorInfo>, HeaderError> {
    let text = std::str::from_utf8(json).map_err(|error| HeaderError::Json(error.to_string()))?;
    if !text.starts_with('{') {
        return Err(HeaderError::Json("it does not begin with `{`".to_owned()));
    }
    let Raw(entries) =
        serde_json::from_str(text).map_err(|error| HeaderError::Json(clip(&error.to_string())))?;
    let mut tensors = entries.into_iter().map(check_entry).collect::<Result<Vec<_>, _>>()?;
    refuse_duplicates(&tensors)?;
    // One without elements comes before the tensor that begins where it does.
    tensors.sort_unstable_by_key(|tensor| (tensor.begin, tensor.end));
    let mut expected = 0;
    for tensor in &tensors {
        if tensor.begin != expected {
            let (tensor, begin) = (tensor.name.clone(), tensor.begin);
            return Err(HeaderError::NotContiguous { tensor, begin, expected });
        }
        expected = tensor.end;
    }
    if expected != data_length {
        return Err(HeaderError::Cover { described: expected, present: data_length });
    }
    Ok(tensors)
}

fn refuse_duplicates(tensors: &[TensorInfo]) -> Result<(), HeaderError> {
    let mut seen = HashSet::with_capacity(tensors.len());
    match tensors.iter().find(|tensor| !seen.insert(tensor.name.as_str())) {
        None => Ok(()),
        Some(twice) => Err(entry_error(&twice.name, "comes twice")),
    }
}

fn entry_error(name: &str, reason: impl Into<String>) -> HeaderError {
    HeaderError::Tensor { tensor: clip(name), reason: reason.into() }
}

fn check_entry((name, entry): (String, Entry)) -> Result<TensorInfo, HeaderError> {
    let fail = |reason: String| entry_error(&name, reason);
    if name.is_empty() || name.len() > LONGEST_NAME || name.chars().any(char::is_control) {
        return Err(fail(format!("a name is 1 to {LONGEST_NAME} bytes without control characters")));
    }
    let element = Element::parse(&entry.dtype)
        .ok_or_else(|| fail(format!("dtype {} is unknown or takes no whole bytes", clip(&entry.dtype))))?;
    let Shape(dimensions) = entry.shape;
    let too_big = || fail(format!("shape {dimensions:?} is too big to be addressed"));
    let mut bytes = element.size();
    for &dimension in &dimensions {
        bytes = bytes.checked_mul(dimension).ok_or_else(too_big)?;
    }
    let shape = dimensions.iter().map(|&dimension| usize::try_from(dimension)).collect::<Result<Vec<_>, _>>();
    let shape = shape.map_err(|_| too_big())?;
    let (begin, end) = entry.data_offsets;
    if end.checked_sub(begin) != Some(bytes) {
        return Err(fail(format!(
            "data_offsets [{begin}, {end}] do not span the {bytes} bytes of {} {shape:?}",
            element.name()
        )));
    }
    if begin % element.size() != 0 {
        return Err(fail(format!("begins at data byte {begin}, which {} does not divide", element.size())));
    }
    Ok(TensorInfo { name, element, shape, begin, end })
}

/// Entries as they are written, in order, duplicates included.
struct Raw(Vec<(String, Entry)>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object that names tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let mut entries = Vec::new();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if metadata.replace(map.next_value::<Option<Metadata>>()?).is_some() {
                    return Err(A::Error::custom("`__metadata__` comes twice"));
                }
                continue;
            }
            if entries.len() == MOST_TENSORS {
                return Err(A::Error::custom(format!("more than {MOST_TENSORS} tensors")));
            }
            let entry = map
                .next_value::<Entry>()
                .map_err(|error| A::Error::custom(format!("tensor `{}`: {error}", clip(&name))))?;
            entries.push((name, entry));
        }
        Ok(Raw(entries))
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Shape;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {MOST_DIMENSIONS} dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Shape, A::Error> {
        let mut shape = Vec::new();
        while let Some(dimension) = items.next_element()? {
            if shape.len() == MOST_DIMENSIONS {
                return Err(A::Error::invalid_length(shape.len() + 1, &self));
            }
            shape.push(dimension);
        }
        Ok(Shape(shape))
    }
}

/// `__metadata__`: strings by strings, checked and dropped.
struct Metadata;

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MetadataVisitor)
    }
}

struct MetadataVisitor;

impl<'de> Visitor<'de> for MetadataVisitor {
    type Value = Metadata;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("`__metadata__` to be an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
        let mut seen = HashSet::new();
        let mut bytes = 0;
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            bytes += key.len() + value.len();
            if bytes > LONGEST_METADATA {
                return Err(A::Error::custom(format!(
                    "`__metadata__` is longer than {LONGEST_METADATA} bytes"
                )));
            }
            if let Some(twice) = seen.replace(key) {
                return Err(A::Error::custom(format!("`__metadata__` has the key `{}` twice", clip(&twice))));
            }
        }
        Ok(Metadata)
    }
}
