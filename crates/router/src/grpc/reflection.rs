//! Server reflection, in its final version and the one before, which older tools ask for.
//!
//! Own implementation: the library's ends a stream at the first unknown name, where the protocol has an error for one
//! request and answers the next.

use std::pin::Pin;
use std::sync::Arc;

use muster_proto::symbols::{NotDescriptors, Symbols};
use tokio_stream::{Stream, StreamExt};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_reflection::pb;

/// Names and descriptors of the served services.
#[derive(Debug, Clone)]
pub(super) struct Reflection {
    services: Arc<[String]>,
    symbols: Arc<Symbols>,
}

impl Reflection {
    /// Lists these services.
    ///
    /// # Errors
    /// When a descriptor of ours cannot be read.
    pub(super) fn new(services: &[&str]) -> Result<Self, NotDescriptors> {
        let symbols = Symbols::new(&[
            muster_proto::DESCRIPTORS,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            pb::v1::FILE_DESCRIPTOR_SET,
            pb::v1alpha::FILE_DESCRIPTOR_SET,
        ])?;
        let services = services.iter().map(|&name| name.to_owned()).collect();
        Ok(Self { services, symbols: Arc::new(symbols) })
    }
}

fn not_found(what: &str) -> (i32, String) {
    let what: String = what.chars().take(200).collect();
    (Code::NotFound.into(), format!("{what} is not described here"))
}

/// Both versions have the same messages under two names.
macro_rules! version {
    ($version:ident) => {
        mod $version {
            use super::*;
            use tonic_reflection::pb::$version::server_reflection_request::MessageRequest as Asked;
            use tonic_reflection::pb::$version::server_reflection_response::MessageResponse as Answer;
            use tonic_reflection::pb::$version::server_reflection_server::ServerReflection;
            use tonic_reflection::pb::$version::{
                ErrorResponse, ExtensionNumberResponse, FileDescriptorResponse, ListServiceResponse,
                ServerReflectionRequest, ServerReflectionResponse, ServiceResponse,
            };

            fn answer(reflection: &Reflection, asked: Option<&Asked>) -> Result<Answer, (i32, String)> {
                let file = |bytes: Option<bytes::Bytes>, name: &str| {
                    let bytes = bytes.ok_or_else(|| not_found(name))?;
                    let file_descriptor_proto = vec![bytes.to_vec()];
                    Ok(Answer::FileDescriptorResponse(FileDescriptorResponse { file_descriptor_proto }))
                };
                match asked {
                    None => Err((Code::InvalidArgument.into(), "nothing was asked".to_owned())),
                    Some(Asked::FileByFilename(name)) => file(reflection.symbols.file(name), name),
                    Some(Asked::FileContainingSymbol(name)) => {
                        file(reflection.symbols.containing(name), name)
                    }
                    Some(Asked::FileContainingExtension(asked)) => {
                        Err(not_found(&format!("an extension of {}", asked.containing_type)))
                    }
                    // There are no extensions: a known type has none.
                    Some(Asked::AllExtensionNumbersOfType(name)) => {
                        reflection.symbols.containing(name).ok_or_else(|| not_found(name))?;
                        let base_type_name = name.clone();
                        Ok(Answer::AllExtensionNumbersResponse(ExtensionNumberResponse {
                            base_type_name,
                            extension_number: Vec::new(),
                        }))
                    }
                    Some(Asked::ListServices(_)) => {
                        let service =
                            reflection.services.iter().map(|name| ServiceResponse { name: name.clone() });
                        Ok(Answer::ListServicesResponse(ListServiceResponse { service: service.collect() }))
                    }
                }
            }

            #[tonic::async_trait]
            impl ServerReflection for Reflection {
                type ServerReflectionInfoStream =
                    Pin<Box<dyn Stream<Item = Result<ServerReflectionResponse, Status>> + Send>>;

                async fn server_reflection_info(
                    &self,
                    request: Request<Streaming<ServerReflectionRequest>>,
                ) -> Result<Response<Self::ServerReflectionInfoStream>, Status> {
                    let this = self.clone();
                    let answers = request.into_inner().map(move |request| {
                        let request = request?;
                        let answered = answer(&this, request.message_request.as_ref());
                        let answered = answered.unwrap_or_else(|(error_code, error_message)| {
                            Answer::ErrorResponse(ErrorResponse { error_code, error_message })
                        });
                        Ok(ServerReflectionResponse {
                            valid_host: request.host.clone(),
                            original_request: Some(request),
                            message_response: Some(answered),
                        })
                    });
                    Ok(Response::new(Box::pin(answers)))
                }
            }
        }
    };
}

version!(v1);
version!(v1alpha);
