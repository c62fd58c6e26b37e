//! Access control of the gRPC services for clients.

use muster_dispatch_grpc::secured::Caller;
use muster_identity::{Access, Denied};
use tonic::metadata::MetadataMap;
use tonic::service::Interceptor;
use tonic::{Extensions, Request, Status};

/// Checks a caller's certificate or API key.
///
/// # Errors
/// `UNAUTHENTICATED` or `PERMISSION_DENIED` when neither suffices.
pub(super) fn let_in(access: &Access, metadata: &MetadataMap, extensions: &Extensions) -> Result<(), Status> {
    let peer = extensions.get::<Caller>().and_then(|caller| caller.peer.as_ref());
    let shown = metadata.get("authorization").map(|value| value.as_bytes());
    access.client(peer, shown).map_err(|denied| {
        let denied = denied.with_headers(|header| metadata.contains_key(header));
        metrics::counter!("muster_access_denied_total", "what" => "grpc").increment(1);
        match denied {
            Denied::Nothing | Denied::Scheme | Denied::Header { .. } | Denied::Key => {
                Status::unauthenticated(denied.to_string())
            }
            Denied::Role { .. } => Status::permission_denied(denied.to_string()),
        }
    })
}

/// Interceptor that checks every call of a service.
#[derive(Debug, Clone)]
pub(super) struct ClientsOnly(pub(super) Access);

impl Interceptor for ClientsOnly {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let_in(&self.0, request.metadata(), request.extensions())?;
        Ok(request)
    }
}
