//! Names for the content of KV blocks.
//!
//! The keys and values of a position depend on the tokens up to it, on the classes of devices that experts are bound to, and on
//! nothing else, so a full block is named by those and all tokens up to its end: a SHA-256 of the name of the block before it and of its own tokens. Whoever could make two
//! prefixes with one name could be served another's attention; hence a cryptographic hash. Every group of layers has
//! blocks of its own for the same tokens, which its number tells apart. Knows nothing of blocks.

use muster_types::{BindingName, TokenId};
use sha2::{Digest, Sha256};

/// The name of what a full block holds of one group of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BlockName {
    pub(crate) group: u32,
    pub(crate) key: BlockKey,
}

/// The name of a full block's tokens, and of all before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BlockKey([u8; 32]);

impl BlockKey {
    /// What the first block of a sequence follows whose experts are bound so; `None` in a cluster of CPUs.
    pub(crate) fn origin(binding: BindingName) -> Option<Self> {
        let is_default = binding == BindingName::default();
        (!is_default).then(|| Self(Sha256::digest(binding.to_string()).into()))
    }

    /// Of the block with these tokens that follows `before`, or begins a sequence. All blocks must have the same
    /// number of tokens.
    pub(crate) fn after(before: Option<&Self>, tokens: &[TokenId]) -> Self {
        let mut hash = Sha256::new();
        hash.update(before.map_or([0; 32], |key| key.0));
        for token in tokens {
            hash.update(token.get().to_le_bytes());
        }
        Self(hash.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use muster_types::NumericsClass;

    use super::*;

    #[test]
    fn a_name_depends_on_every_token_so_far() {
        let tokens: Vec<TokenId> = TokenId::all(4).collect();
        let chain = |first: &[TokenId], second: &[TokenId]| {
            BlockKey::after(Some(&BlockKey::after(None, first)), second)
        };
        let name = chain(&tokens[..2], &tokens[2..]);
        assert_eq!(name, chain(&[tokens[0], tokens[1]], &[tokens[2], tokens[3]]));
        assert_ne!(name, chain(&[tokens[1], tokens[0]], &tokens[2..]));
        assert_ne!(name, chain(&tokens[..2], &[tokens[3], tokens[2]]));
        assert_ne!(name, BlockKey::after(None, &tokens[2..]));
        let bound = |binding| BlockKey::after(BlockKey::origin(binding).as_ref(), &tokens[..2]);
        assert_eq!(bound(BindingName::default()), BlockKey::after(None, &tokens[..2]));
        let others = [
            BindingName::default(),
            BindingName::One(NumericsClass::CudaMma),
            BindingName::Several([1; 32]),
            BindingName::Several([2; 32]),
        ];
        assert_eq!(others.map(bound).into_iter().collect::<BTreeSet<_>>().len(), others.len());
    }
}
