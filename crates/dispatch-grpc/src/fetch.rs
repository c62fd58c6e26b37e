//! Fetching the weights of an expert from a process that has them.
//!
//! Always holds: fetched weights have the right length, the digest that their sender gave, and the expected digest, where
//! one is known.

use std::collections::HashMap;
use std::time::Duration;

use muster_proto::control::Fetch;
use muster_proto::expert::v1::weights_client::WeightsClient;
use muster_types::{WeightDigest, WeightHasher};
use sha2::{Digest, Sha256};
use tonic::transport::Channel;

use crate::address::Address;
use crate::transport::{self, Dialer};

/// Longest silence of the other side.
const SILENCE: Duration = Duration::from_secs(10);
/// Connections that are kept.
const CONNECTIONS: usize = 16;
/// Largest message: one part of an expert.
const MESSAGE: usize = 1 << 20;

/// Weights that could not be fetched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The other side cannot be reached, or does not hold the expert.
    #[error("{0}")]
    Refused(String),
    /// The other side is silent.
    #[error("no answer within {SILENCE:?}")]
    Silent,
    /// The bytes differ from the sender's digest or length.
    #[error("the weights were damaged on the way or are others: {0}")]
    Damaged(String),
    /// The sender's digest differs from the expected one.
    #[error("the weights have digest {theirs} there and must have {ours}")]
    Others {
        /// The expected digest.
        ours: WeightDigest,
        /// The sender's digest.
        theirs: WeightDigest,
    },
}

/// Fetches experts; keeps connections from one to the next.
pub struct Fetcher {
    dialer: Dialer,
    channels: HashMap<Address, Channel>,
}

impl Fetcher {
    /// One that has no connections yet.
    #[must_use]
    pub fn new(dialer: Dialer) -> Self {
        Self { dialer, channels: HashMap::new() }
    }

    /// The packed weights of an expert, `bytes` long, and their digest, which must be the expected one, if there is one.
    ///
    /// # Errors
    /// See [`FetchError`]. Another process may have them.
    pub async fn fetch(
        &mut self,
        from: &Address,
        what: &Fetch,
        bytes: usize,
        expected: Option<WeightDigest>,
    ) -> Result<(Vec<u8>, WeightDigest), FetchError> {
        let fetched = self.receive(from, what, bytes).await.and_then(|(data, theirs)| match expected {
            Some(ours) if ours != theirs => Err(FetchError::Others { ours, theirs }),
            _ => Ok((data, theirs)),
        });
        if fetched.is_err() {
            self.channels.remove(from);
        }
        fetched
    }

    async fn receive(
        &mut self,
        from: &Address,
        what: &Fetch,
        bytes: usize,
    ) -> Result<(Vec<u8>, WeightDigest), FetchError> {
        let channel = match self.channels.get(from) {
            Some(channel) => channel.clone(),
            None => {
                let unreachable =
                    |error: tonic::transport::Error| FetchError::Refused(transport::root_cause(&error));
                let channel = patiently(self.dialer.connect(from, SILENCE)).await?.map_err(unreachable)?;
                if self.channels.len() >= CONNECTIONS {
                    self.channels.clear();
                }
                self.channels.insert(from.clone(), channel.clone());
                channel
            }
        };
        let refused =
            |status: tonic::Status| FetchError::Refused(format!("{}: {}", status.code(), status.message()));
        let mut client = WeightsClient::new(channel).max_decoding_message_size(MESSAGE);
        let mut parts = patiently(client.fetch(what.to_wire())).await?.map_err(refused)?.into_inner();
        let mut data = Vec::new();
        let mut hasher = WeightHasher::default();
        loop {
            let Some(part) = patiently(parts.message()).await?.map_err(refused)? else {
                return Err(FetchError::Damaged(format!("it ended after {} of {bytes} bytes", data.len())));
            };
            if part.data.len() > bytes - data.len() {
                return Err(FetchError::Damaged(format!("there are more than {bytes} bytes")));
            }
            if data.is_empty() {
                // Reserved only after the sender has begun to send.
                data.reserve_exact(bytes);
            }
            hasher.update(&part.data);
            data.extend_from_slice(&part.data);
            if part.digest.is_empty() && part.weight_digest.is_empty() {
                continue;
            }
            if data.len() != bytes {
                return Err(FetchError::Damaged(format!("{} bytes instead of {bytes}", data.len())));
            }
            let digest = hasher.finish();
            let is_whole = match part.weight_digest.is_empty() {
                false => digest.as_bytes() == part.weight_digest.as_ref(),
                // Of a version that knows no other.
                true => Sha256::digest(&data).as_slice() == part.digest.as_ref(),
            };
            if !is_whole {
                return Err(FetchError::Damaged("their digest is another".into()));
            }
            return Ok((data, digest));
        }
    }
}

async fn patiently<T>(work: impl Future<Output = T>) -> Result<T, FetchError> {
    tokio::time::timeout(SILENCE, work).await.map_err(|_| FetchError::Silent)
}
