//! A worker's join to a router, which lasts as long as its stream.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use muster_proto::card::ModelCard;
use muster_proto::cluster::v1;
use muster_proto::cluster::v1::cluster_client::ClusterClient;
use muster_proto::version::OURS;
use muster_types::{Fingerprint, WorkerId};
use tonic::{Code, Status, Streaming};

use crate::address::Address;
use crate::transport::{self, Dialer, Instead};

/// Deadline of a router's answer.
const ANSWER: Duration = Duration::from_secs(5);

/// Why a join failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// It cannot be reached now.
    #[error(
        "router at {address} cannot be reached: {reason}; check that it runs and that this is its gRPC address"
    )]
    Unreachable {
        /// Where it should be.
        address: Address,
        /// The error.
        reason: String,
    },
    /// Something else is there.
    #[error("what answers at {address} {instead}; {}", instead.remedy())]
    Other {
        /// Where the router should be.
        address: Address,
        /// What is there.
        instead: Instead,
    },
    /// A gRPC server that is no router.
    #[error("what answers at {address} is no router; give the address of a router's --grpc")]
    NoRouter {
        /// Where it should be.
        address: Address,
    },
    /// The router refused this worker.
    #[error("router at {address} refused this worker: {reason}")]
    Refused {
        /// Where it is.
        address: Address,
        /// In its words.
        reason: String,
    },
}

/// Membership with a router.
pub struct Membership {
    /// The router's model.
    pub card: ModelCard,
    stream: Streaming<v1::JoinReply>,
}

impl Membership {
    /// Waits until the router is gone or ends the membership.
    pub async fn ended(mut self) {
        while let Ok(Some(_)) = self.stream.message().await {}
    }
}

/// Joins a router as a worker that others reach at `me`; `model` is the fingerprint of its model, if it has one.
///
/// # Errors
/// See [`JoinError`].
pub async fn join(
    dialer: &Dialer,
    router: &Address,
    worker: &WorkerId,
    me: &Address,
    model: Option<Fingerprint>,
) -> Result<Membership, JoinError> {
    let unreachable = |reason: String| JoinError::Unreachable { address: router.clone(), reason };
    let refused = |reason: String| JoinError::Refused { address: router.clone(), reason };
    // A status with a source is no router's: the connection broke, and its library chose the code.
    let broke = |status: &Status| std::error::Error::source(status).map(transport::root_cause);
    let failed = |status: Status| match (broke(&status), status.code()) {
        (Some(cause), _) => unreachable(cause),
        (None, Code::Unimplemented) => JoinError::NoRouter { address: router.clone() },
        (
            None,
            Code::InvalidArgument | Code::FailedPrecondition | Code::PermissionDenied | Code::Unauthenticated,
        ) => refused(status.message().to_owned()),
        (None, _) => unreachable(status.message().to_owned()),
    };
    let entering = async {
        let channel = dialer
            .connect(router, ANSWER)
            .await
            .map_err(|error| unreachable(transport::root_cause(&error)))?;
        let (protocol_version, newest_protocol_version) = OURS.to_wire();
        let request = v1::JoinRequest {
            protocol_version,
            newest_protocol_version,
            worker_id: worker.as_str().to_owned(),
            address: me.to_string(),
            fingerprint: model.map_or_else(Vec::new, |model| model.as_bytes().to_vec()).into(),
        };
        let mut stream = ClusterClient::new(channel).join(request).await.map_err(failed)?.into_inner();
        let first = stream.message().await.map_err(failed)?;
        let card = first.and_then(|reply| reply.model).ok_or_else(|| refused("it sent no model".into()))?;
        let card = ModelCard::parse(&card).map_err(|error| refused(format!("its model: {error}")))?;
        Ok(Membership { card, stream })
    };
    let silent = |_| unreachable(format!("no answer within {ANSWER:?}"));
    let entered = tokio::time::timeout(ANSWER, entering).await.map_err(silent)?;
    if let Err(JoinError::Unreachable { reason, .. }) = &entered
        && let Some(instead) = dialer.instead(router, reason).await
    {
        return Err(JoinError::Other { address: router.clone(), instead });
    }
    entered
}

/// Address at which `router` reaches a worker that listens at `listen`. For all addresses it is the one from which this
/// machine speaks to the router.
#[must_use]
pub fn reached_at(listen: &Address, router: &Address) -> Address {
    let (Address::Tcp { host, port }, Address::Tcp { host: far, port: far_port }) = (listen, router) else {
        return listen.clone();
    };
    let ip: Option<IpAddr> = host.parse().ok();
    if !ip.is_some_and(|ip| ip.is_unspecified()) {
        return listen.clone();
    }
    let towards = || {
        // Nothing is sent: the system only picks a route.
        let any = if far.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
        let socket = UdpSocket::bind(any)?;
        socket.connect((far.as_str(), *far_port))?;
        socket.local_addr()
    };
    match towards() {
        Ok(mine) => std::net::SocketAddr::new(mine.ip(), *port).into(),
        Err(_) => listen.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_on_all_addresses_is_reached_where_it_speaks_from() {
        let reached = |listen: &str, router: &str| {
            reached_at(&listen.parse().unwrap(), &router.parse().unwrap()).to_string()
        };
        assert_eq!(reached("127.0.0.1:7", "127.0.0.1:9"), "127.0.0.1:7");
        assert_eq!(reached("0.0.0.0:7", "127.0.0.1:9"), "127.0.0.1:7");
        assert_eq!(reached("unix:/x", "127.0.0.1:9"), "unix:/x");
        assert_eq!(reached("name:7", "127.0.0.1:9"), "name:7");
    }
}
