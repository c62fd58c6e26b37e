//! A client of a router's gRPC API.

use std::time::Duration;

use muster_proto::v1::generate_event::Event;
use muster_proto::v1::inference_client::InferenceClient;
use muster_proto::v1::{GenerateRequest, GetModelRequest, Model, TokenizeRequest};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

use crate::failure::Failure;

/// Where a router listens when nobody says otherwise.
pub(crate) const DEFAULT_GRPC: &str = "http://127.0.0.1:50051";

/// A connection to a router.
#[derive(Clone)]
pub(crate) struct Client(InferenceClient<Channel>);

impl Client {
    /// Connects. `address` is `host:port` or `http://host:port`.
    pub(crate) async fn connect(address: &str) -> Result<Self, Failure> {
        let url = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
        if url.starts_with("https://") {
            return Err(Failure::input(format!("--grpc: {address}: this build speaks plain http:// only")));
        }
        let endpoint = Endpoint::from_shared(url.clone())
            .map_err(|error| Failure::input(format!("--grpc: {address}: {error}; write http://host:port")))?
            .connect_timeout(Duration::from_secs(5))
            .tcp_nodelay(true);
        let channel = endpoint.connect().await.map_err(|error| {
            let reason = root_cause(&error);
            Failure::runtime(format!(
                "no router answers at {url} ({reason}); start one with `muster up`, or say where with --grpc"
            ))
        })?;
        Ok(Self(InferenceClient::new(channel)))
    }

    /// The model that the router serves.
    pub(crate) async fn model(&mut self) -> Result<Model, Failure> {
        Ok(self.0.get_model(GetModelRequest {}).await.map_err(|status| failed(&status))?.into_inner())
    }

    /// Token ids of a text, as the router would use them for a prompt.
    pub(crate) async fn tokenize(&mut self, text: String) -> Result<Vec<u32>, Failure> {
        let request = TokenizeRequest { text, without_special: false };
        Ok(self.0.tokenize(request).await.map_err(|status| failed(&status))?.into_inner().ids)
    }

    /// Starts a generation.
    pub(crate) async fn generate(&mut self, request: GenerateRequest) -> Result<Events, Failure> {
        let stream = self.0.generate(request).await.map_err(|status| failed(&status))?.into_inner();
        Ok(Events(stream))
    }
}

/// The events of one generation.
pub(crate) struct Events(Streaming<muster_proto::v1::GenerateEvent>);

impl Events {
    /// The next event; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<Event>, Failure> {
        match self.0.message().await.map_err(|status| failed(&status))? {
            Some(message) => match message.event {
                Some(event) => Ok(Some(event)),
                None => Err(Failure::runtime("the router sent an empty event; is it another version?")),
            },
            None => Ok(None),
        }
    }
}

fn failed(status: &Status) -> Failure {
    match status.code() {
        Code::InvalidArgument | Code::NotFound | Code::OutOfRange => Failure::input(status.message()),
        Code::Unimplemented => {
            Failure::runtime("what answers there is not a muster router; check the address given with --grpc")
        }
        code => Failure::runtime(format!("the router failed: {} ({code:?})", status.message())),
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}
