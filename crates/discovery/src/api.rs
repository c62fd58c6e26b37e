//! Client of an API server, and its errors.
//!
//! Always holds: every request has a deadline; a process that cannot reach an API server yet can later. An error is one
//! sentence that names the request and the remedy, without addresses; the rest is its detail, for logs.

use std::sync::Arc;
use std::time::Duration;

use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ConfigExt};
use kube::{Client, Config};
use tokio::sync::Mutex;
use tower::{BoxError, ServiceBuilder};

/// Deadline of one request.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(5);

/// Client of the API server of this process's cluster. No request goes out before it is needed.
#[derive(Clone, Default)]
pub struct Api(Arc<Mutex<Option<Client>>>);

impl Api {
    /// The API server that the environment names: `KUBECONFIG`, `~/.kube/config`, or that of the pod.
    #[must_use]
    pub fn infer() -> Self {
        Self::default()
    }

    /// The one that this client speaks to.
    #[must_use]
    pub fn of(client: Client) -> Self {
        Self(Arc::new(Mutex::new(Some(client))))
    }

    /// # Errors
    /// When the environment names none.
    pub(crate) async fn client(&self) -> Result<Client, ApiError> {
        let mut kept = self.0.lock().await;
        if let Some(client) = &*kept {
            return Ok(client.clone());
        }
        let config = Config::infer().await.map_err(|error| ApiError::Unknown(chain(&error)))?;
        let client = connect(&config).map_err(|error| ApiError::Unknown(chain(&error)))?;
        Ok(kept.insert(client).clone())
    }

    /// The default namespace: the pod's, or that of the kubeconfig.
    ///
    /// # Errors
    /// When the environment names no API server.
    pub async fn namespace(&self) -> Result<String, ApiError> {
        Ok(self.client().await?.default_namespace().to_owned())
    }
}

/// As [`Client::try_from`], but for what is between requests and the wire there: it logs every failure by itself, and
/// tries again when a deadline may have passed.
fn connect(config: &Config) -> Result<Client, kube::Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT));
    let connector = config.rustls_https_connector_with_connector(tcp)?;
    let http: HttpClient<_, Body> = HttpClient::builder(TokioExecutor::new()).build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace.clone()))
}

/// A request to the API server, in its own terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Access {
    /// All needed verbs, for the remedy.
    pub(crate) verbs: &'static str,
    pub(crate) resource: &'static str,
    /// `""` is the core group.
    pub(crate) group: &'static str,
    pub(crate) namespace: String,
}

/// A failed request to the API server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// This process knows no API server.
    #[error(
        "no way to an API server is known; run in a pod whose ServiceAccount token is mounted \
         (automountServiceAccountToken), or name a kubeconfig in KUBECONFIG"
    )]
    Unknown(String),
    /// It could not be reached.
    #[error("the API server cannot be reached; what was known is kept")]
    Unreachable(String),
    /// It gave no answer.
    #[error("the API server gave no answer within {0:?}; what was known is kept")]
    Silent(Duration),
    /// It does not know the caller.
    #[error(
        "the API server does not accept the credentials of this process; check the ServiceAccount and its token"
    )]
    Unauthorized(String),
    /// It denies the caller.
    #[error(
        "{account} may not use {resource} in namespace {namespace}; give it a Role with the verbs {verbs} on {resource} \
         of the API group {group:?}, and a RoleBinding"
    )]
    Denied {
        /// The caller.
        account: String,
        /// For what.
        resource: &'static str,
        /// Of which group.
        group: &'static str,
        /// Where.
        namespace: String,
        /// What is needed.
        verbs: &'static str,
        /// What the API server said.
        detail: String,
    },
    /// It does not serve the resource.
    #[error("the API server serves no {0}")]
    NotServed(&'static str),
    /// The object does not exist.
    #[error("there is no such object")]
    NotFound,
    /// A conflict: another writer was faster.
    #[error("somebody else changed it at the same time")]
    Conflict,
    /// The known version is too old.
    #[error("what was known is too old for the API server")]
    Gone,
    /// Anything else that it said.
    #[error("the API server answers {code}: {message}")]
    Status {
        /// As in HTTP.
        code: u16,
        /// Its reason.
        message: String,
    },
    /// Its answer cannot be parsed.
    #[error("the API server's answer cannot be read")]
    Unreadable(String),
}

impl ApiError {
    pub(crate) fn of(error: &kube::Error, access: &Access) -> Self {
        use kube::Error;
        match error {
            Error::Api(status) => Self::status(status.code, &status.message, access),
            Error::SerdeError(_) | Error::FromUtf8(_) | Error::LinesCodecMaxLineLengthExceeded => {
                Self::Unreadable(chain(error))
            }
            Error::Auth(_) => Self::Unauthorized(chain(error)),
            _ => Self::Unreachable(chain(error)),
        }
    }

    pub(crate) fn status(code: u16, message: &str, access: &Access) -> Self {
        let message: String = message.chars().filter(|c| !c.is_control()).take(500).collect();
        match code {
            401 => Self::Unauthorized(message),
            403 => Self::Denied {
                account: account(&message),
                resource: access.resource,
                group: access.group,
                namespace: access.namespace.clone(),
                verbs: access.verbs,
                detail: message,
            },
            404 => Self::NotFound,
            409 => Self::Conflict,
            410 => Self::Gone,
            code => Self::Status { code, message },
        }
    }

    /// The detail beyond the sentence; may name addresses.
    #[must_use]
    pub fn detail(&self) -> &str {
        match self {
            Self::Unknown(detail)
            | Self::Unreachable(detail)
            | Self::Unauthorized(detail)
            | Self::Denied { detail, .. }
            | Self::Unreadable(detail) => detail,
            _ => "",
        }
    }
}

/// Asks, and gives up after `patience`.
pub(crate) async fn within<T>(
    patience: Duration,
    access: &Access,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(patience, request).await {
        Ok(outcome) => outcome.map_err(|error| ApiError::of(&error, access)),
        Err(_) => Err(ApiError::Silent(patience)),
    }
}

/// As [`within`], for what need not be there.
pub(crate) async fn found<T>(
    patience: Duration,
    access: &Access,
    request: impl Future<Output = Result<T, kube::Error>>,
) -> Result<Option<T>, ApiError> {
    match within(patience, access, request).await {
        Ok(object) => Ok(Some(object)),
        Err(ApiError::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The denied caller, from the API server's message.
fn account(message: &str) -> String {
    let user = message.split_once("User \"").and_then(|(_, rest)| rest.split_once('"')).map(|(user, _)| user);
    match user.map(|user| (user, user.strip_prefix("system:serviceaccount:"))) {
        Some((_, Some(account))) => format!("ServiceAccount {}", account.replace(':', "/")),
        Some((user, None)) => format!("user {user}"),
        None => "this process".to_owned(),
    }
}

/// An error and what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_names_who_what_where_and_the_remedy() {
        let access = Access {
            verbs: "list and watch",
            resource: "endpointslices",
            group: "discovery.k8s.io",
            namespace: "ml".to_owned(),
        };
        let message = "endpointslices.discovery.k8s.io is forbidden: User \"system:serviceaccount:ml:router\" cannot list \
                       resource \"endpointslices\" in API group \"discovery.k8s.io\" in the namespace \"ml\"";
        let error = ApiError::status(403, message, &access);
        assert_eq!(
            error.to_string(),
            "ServiceAccount ml/router may not use endpointslices in namespace ml; give it a Role with the verbs list and \
             watch on endpointslices of the API group \"discovery.k8s.io\", and a RoleBinding"
        );
        assert_eq!(error.detail(), message);
        assert!(ApiError::status(403, "no", &access).to_string().starts_with("this process may not"));
        let other = ApiError::status(403, "User \"eve\" cannot", &access).to_string();
        assert!(other.starts_with("user eve may not"), "{other}");
    }

    #[test]
    fn what_the_server_says_is_bounded() {
        let access = Access { verbs: "", resource: "", group: "", namespace: String::new() };
        let error = ApiError::status(500, &"x\n".repeat(10_000), &access).to_string();
        assert!(error.len() < 600 && !error.contains('\n'), "{}", error.len());
    }
}
