//! Access to public interfaces.

use std::sync::Arc;

use crate::keys::{ApiKeys, KeysError};
use crate::peer::{PeerId, Role};
use crate::reloaded::Reloaded;

/// Callers that public interfaces admit.
#[derive(Debug, Clone)]
pub enum Access {
    /// All callers.
    Open,
    /// Callers with a client's certificate of the cluster, or, where there are keys, a valid key.
    Known(Option<Arc<Reloaded<ApiKeys>>>),
}

/// Why a caller is refused. Says nothing that helps to guess.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No credentials.
    #[error("this needs an API key (authorization: Bearer KEY) or a client certificate of this cluster")]
    Nothing,
    /// A malformed key.
    #[error(
        "the authorization header is not of the form that this takes; send authorization: Bearer KEY, with that word before the key"
    )]
    Scheme,
    /// A key in the wrong place.
    #[error("a key in the header {header} is not taken; send authorization: Bearer KEY")]
    Header {
        /// Its place.
        header: &'static str,
    },
    /// The key is not valid.
    #[error("the API key is not known here; it may have been revoked")]
    Key,
    /// The certificate has another role.
    #[error("{peer} may not ask for this; it takes a certificate of a {wanted}")]
    Role {
        /// The caller.
        peer: PeerId,
        /// Who may.
        wanted: &'static str,
    },
}

impl Access {
    /// Access by a file of keys.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn by_keys(file: std::path::PathBuf) -> Result<Self, KeysError> {
        Ok(Self::Known(Some(Arc::new(Reloaded::load(vec![file])?))))
    }

    /// Takes a changed file into use, for ever.
    pub async fn keep_fresh(self) {
        if let Self::Known(Some(keys)) = self {
            keys.keep_fresh().await;
        }
    }

    /// Admits a caller to the calls of clients.
    ///
    /// # Errors
    /// When none of its credentials is valid for that.
    pub fn client(&self, peer: Option<&PeerId>, authorization: Option<&[u8]>) -> Result<(), Denied> {
        let Self::Known(keys) = self else { return Ok(()) };
        if peer.is_some_and(|peer| peer.role() == Role::Client) {
            return Ok(());
        }
        let key = authorization.map(|value| std::str::from_utf8(value).ok().and_then(bearer));
        match (keys, key) {
            (Some(keys), Some(Some(key))) if keys.current().name_of(key).is_some() => Ok(()),
            (_, Some(Some(_))) => Err(Denied::Key),
            (_, Some(None)) => Err(Denied::Scheme),
            (_, None) => match peer {
                Some(peer) => Err(Denied::Role { peer: peer.clone(), wanted: "client" }),
                None => Err(Denied::Nothing),
            },
        }
    }
}

impl Denied {
    /// The error, when there are no credentials but a header in which clients of other servers send keys.
    #[must_use]
    pub fn with_headers(self, has: impl Fn(&str) -> bool) -> Self {
        match ["x-api-key", "api-key"].into_iter().find(|header| has(header)) {
            Some(header) if self == Self::Nothing => Self::Header { header },
            _ => self,
        }
    }
}

fn bearer(value: &str) -> Option<&str> {
    let (scheme, key) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::NewKey;

    #[test]
    fn who_shows_what_is_let_in() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("keys");
        let (mine, revoked) = (NewKey::generate("mine").unwrap(), NewKey::generate("old").unwrap());
        std::fs::write(&file, format!("{}\n{}\n", mine.line, revoked.line)).unwrap();
        let access = Access::by_keys(file.clone()).unwrap();
        let Access::Known(Some(keys)) = &access else { panic!("by keys") };
        let bearer = |key: &str| format!("Bearer {key}").into_bytes();
        let peer = |role| PeerId::new("m", role).unwrap();

        assert_eq!(access.client(None, None), Err(Denied::Nothing));
        assert_eq!(access.client(None, Some(&bearer(&mine.key))), Ok(()));
        assert_eq!(access.client(None, Some(format!("bearer  {}", mine.key).as_bytes())), Ok(()));
        assert_eq!(access.client(Some(&peer(Role::Client)), None), Ok(()));
        assert_eq!(access.client(Some(&peer(Role::Worker)), Some(&bearer(&mine.key))), Ok(()));
        assert!(matches!(access.client(Some(&peer(Role::Worker)), None), Err(Denied::Role { .. })));
        for wrong in [&b"Basic x"[..], b"", b"Bearer", b"Bearer \xff", &mine.key.clone().into_bytes()] {
            assert_eq!(access.client(None, Some(wrong)), Err(Denied::Scheme));
        }
        assert!(Denied::Scheme.to_string().contains("Bearer KEY"));
        let elsewhere = Denied::Nothing.with_headers(|header| header == "x-api-key");
        assert!(
            elsewhere.to_string().contains("header x-api-key is not taken; send authorization: Bearer KEY")
        );
        assert_eq!(Denied::Nothing.with_headers(|_| false), Denied::Nothing);
        assert_eq!(Denied::Key.with_headers(|_| true), Denied::Key);
        assert_eq!(access.client(None, Some(b"Bearer ")), Err(Denied::Key));

        assert_eq!(access.client(None, Some(&bearer(&revoked.key))), Ok(()));
        std::fs::write(&file, &mine.line).unwrap();
        assert!(keys.refresh().unwrap());
        assert_eq!(access.client(None, Some(&bearer(&revoked.key))), Err(Denied::Key));
        assert_eq!(access.client(None, Some(&bearer(&mine.key))), Ok(()));

        // Without keys only certificates are good.
        let certificates = Access::Known(None);
        assert_eq!(certificates.client(None, Some(&bearer(&mine.key))), Err(Denied::Key));
        assert_eq!(certificates.client(Some(&peer(Role::Client)), None), Ok(()));
        assert_eq!(Access::Open.client(None, None), Ok(()));
    }
}
