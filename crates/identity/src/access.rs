//! Who may ask for what.

use std::sync::Arc;

use crate::keys::{ApiKeys, KeysError};
use crate::peer::{PeerId, Role};
use crate::reloaded::Reloaded;

/// Who is let in by public interfaces.
#[derive(Debug, Clone)]
pub enum Access {
    /// Everybody.
    Open,
    /// Who has a certificate of the cluster for asking, or a good key, where there are keys.
    Known(Option<Arc<Reloaded<ApiKeys>>>),
}

/// Why somebody is not let in. Says nothing that helps to guess.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Nothing was shown.
    #[error("this needs an API key (authorization: Bearer KEY) or a client certificate of this cluster")]
    Nothing,
    /// Something was shown that is no key as keys are shown.
    #[error(
        "the authorization header is not of the form that this takes; send authorization: Bearer KEY, with that word before the key"
    )]
    Scheme,
    /// A key was shown where keys are not looked for.
    #[error("a key in the header {header} is not taken; send authorization: Bearer KEY")]
    Header {
        /// Where it was.
        header: &'static str,
    },
    /// The key is not good.
    #[error("the API key is not known here; it may have been revoked")]
    Key,
    /// The certificate is one for something else.
    #[error("{peer} may not ask for this; it takes a certificate of a {wanted}")]
    Role {
        /// Who asked.
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

    /// Lets somebody ask for what clients ask for.
    ///
    /// # Errors
    /// When nothing that was shown is good for that.
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
    /// The same, where nothing was shown and one of the headers is there in which clients of other servers send keys.
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
