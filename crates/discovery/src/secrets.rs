//! Secrets with a certificate, its key and what else belongs to them.
//!
//! Never logs what is in one.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};

use crate::api::{Access, Api, ApiError, PATIENCE, found, within};

/// The type of such Secrets.
const TLS: &str = "kubernetes.io/tls";
/// Number of lost races that are retried.
const ATTEMPTS: usize = 5;

/// Contents of a Secret; `None` without such a Secret.
///
/// # Errors
/// When the API server cannot be asked or says no.
pub async fn read(
    api: &Api,
    namespace: Option<&str>,
    name: &str,
) -> Result<Option<BTreeMap<String, Vec<u8>>>, ApiError> {
    let (secrets, access) = secrets(api, namespace).await?;
    let secret = found(PATIENCE, &access, secrets.get(name)).await?;
    let entries =
        |secret: Secret| secret.data.unwrap_or_default().into_iter().map(|(key, value)| (key, value.0));
    Ok(secret.map(|secret| entries(secret).collect()))
}

/// Creates a Secret of type `kubernetes.io/tls` with exactly these entries, or gives them to the one there is. Its labels and
/// annotations stay.
///
/// # Errors
/// When the API server cannot be asked or says no, as it does when a Secret of that name has another type.
pub async fn write(
    api: &Api,
    namespace: Option<&str>,
    name: &str,
    entries: &BTreeMap<String, Vec<u8>>,
) -> Result<(), ApiError> {
    let (secrets, access) = secrets(api, namespace).await?;
    let data = entries.iter().map(|(key, value)| (key.clone(), ByteString(value.clone()))).collect();
    let new = Secret {
        metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
        type_: Some(TLS.to_owned()),
        data: Some(data),
        ..Secret::default()
    };
    let params = PostParams::default();
    let mut outcome = Ok(());
    for _ in 0..ATTEMPTS {
        outcome = match found(PATIENCE, &access, secrets.get(name)).await? {
            None => within(PATIENCE, &access, secrets.create(&params, &new)).await.map(drop),
            Some(old) => {
                // With the version that was read, so that nothing is overwritten unseen.
                let secret = Secret { data: new.data.clone(), ..old };
                if secret.type_.as_deref() != Some(TLS) {
                    let kind = secret.type_.as_deref().unwrap_or("Opaque");
                    let message = format!(
                        "Secret {name} is of type {kind}, not {TLS}; delete it or choose another name"
                    );
                    return Err(ApiError::Status { code: 422, message });
                }
                within(PATIENCE, &access, secrets.replace(name, &params, &secret)).await.map(drop)
            }
        };
        if !matches!(outcome, Err(ApiError::Conflict | ApiError::NotFound)) {
            return outcome;
        }
    }
    outcome
}

async fn secrets(api: &Api, namespace: Option<&str>) -> Result<(kube::Api<Secret>, Access), ApiError> {
    let client = api.client().await?;
    let namespace = namespace.map_or_else(|| client.default_namespace().to_owned(), str::to_owned);
    let access = Access {
        verbs: "get, create and update",
        resource: "secrets",
        group: "",
        namespace: namespace.clone(),
    };
    Ok((kube::Api::namespaced(client, &namespace), access))
}
