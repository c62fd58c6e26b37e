//! A client's credentials, and the authority that it trusts for routers.

use std::fmt;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Certificate, ClientTlsConfig, Identity};
use tonic::{Request, Status};

use crate::error::ClientError;

/// A client's credentials, over https. By default it has none and trusts the public authorities.
#[derive(Clone, Default)]
pub struct Credentials {
    /// Certificates, PEM, of the authority that routers must have.
    pub ca: Option<String>,
    /// This client's certificate and its key, PEM.
    pub identity: Option<(String, String)>,
    /// An API key.
    pub api_key: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither keys nor how long they are.
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl Credentials {
    pub(crate) fn tls(&self) -> ClientTlsConfig {
        let tls = match &self.ca {
            Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)),
            None => ClientTlsConfig::new().with_webpki_roots(),
        };
        match &self.identity {
            Some((cert, key)) => tls.identity(Identity::from_pem(cert, key)),
            None => tls,
        }
    }

    /// # Errors
    /// When the API key has characters that no key has.
    pub(crate) fn bearer(&self) -> Result<Bearer, ClientError> {
        let Some(key) = &self.api_key else { return Ok(Bearer(None)) };
        let mut value: MetadataValue<Ascii> =
            format!("Bearer {key}").parse().map_err(|_| ClientError::Key)?;
        value.set_sensitive(true);
        Ok(Bearer(Some(value)))
    }
}

/// Sends the key with every call.
#[derive(Debug, Clone)]
pub(crate) struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}
