//! `muster.v1.Inference` over a [`Service`].

use std::pin::Pin;

use muster_proto::v1;
use muster_proto::v1::inference_server::Inference;
use muster_text::{Special, SpecialText};
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status};

use super::convert;
use crate::service::Service;

/// The implementation; all state is in the service.
pub(super) struct Api {
    service: Service,
}

impl Api {
    pub(super) fn new(service: Service) -> Self {
        Self { service }
    }
}

#[tonic::async_trait]
impl Inference for Api {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateEvent, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let generation = match convert::request(request.into_inner(), self.service.limits()) {
            Ok(request) => self.service.generate(request).await,
            Err(error) => Err(error),
        };
        counted("Generate", generation.map_err(|error| convert::status(&error))).map(|generation| {
            let started = convert::started(&generation.started, self.service.model());
            let events =
                generation.map(|item| item.map(convert::event).map_err(|error| convert::status(&error)));
            // Dropping the stream, which tonic does when the client is gone, drops the generation.
            let stream = tokio_stream::once(Ok(started)).chain(events);
            Response::new(Box::pin(stream) as Self::GenerateStream)
        })
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let v1::TokenizeRequest { text, without_special } = request.into_inner();
        let special = if without_special { Special::Omit } else { Special::Add };
        let ids = self.service.tokenize(text, special).await;
        counted("Tokenize", ids.map_err(|error| convert::status(&error)))
            .map(|ids| Response::new(v1::TokenizeResponse { ids }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let v1::DetokenizeRequest { ids, with_special } = request.into_inner();
        let special = if with_special { SpecialText::Keep } else { SpecialText::Drop };
        let text = self.service.detokenize(ids, special).await;
        counted("Detokenize", text.map_err(|error| convert::status(&error)))
            .map(|text| Response::new(v1::DetokenizeResponse { text }))
    }

    async fn get_model(&self, _: Request<v1::GetModelRequest>) -> Result<Response<v1::Model>, Status> {
        counted("GetModel", Ok(Response::new(convert::model(self.service.model()))))
    }
}

/// Counts an answer by method and status code; for a stream, the status with which it began.
fn counted<T>(method: &'static str, result: Result<T, Status>) -> Result<T, Status> {
    let code = result.as_ref().err().map_or(Code::Ok, Status::code);
    let code = i32::from(code).to_string();
    metrics::counter!("muster_grpc_requests_total", "method" => method, "code" => code).increment(1);
    result
}
