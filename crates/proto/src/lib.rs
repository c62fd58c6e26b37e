//! The wire: generated protobuf code, checked conversions both ways, and tensor frames.
//!
//! Bytes from another process become values here and nowhere else. Every `parse` function checks all that the
//! `.proto` comments promise before anything is allocated or indexed by a claimed size, names the field that is
//! wrong, and never panics. Knows nothing about sockets, streams, threads or experts.

pub mod card;
pub mod control;
pub mod convert;
pub mod description;
pub mod frame;
pub mod handshake;
pub mod limits;
pub mod reply;
pub mod shard;
pub mod symbols;
pub mod version;

/// Encoded `FileDescriptorSet` of everything in `/proto`, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/muster.descriptors"));

/// Membership of a cluster.
pub mod cluster {
    /// Version 1.
    #[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, clippy::pedantic)]
    pub mod v1 {
        tonic::include_proto!("muster.cluster.v1");
    }
}

/// Messages between a router and a worker.
pub mod expert {
    /// Version 1.
    #[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, clippy::pedantic)]
    pub mod v1 {
        tonic::include_proto!("muster.expert.v1");
    }
}

/// The public API of a router, version 1.
#[allow(missing_docs, unreachable_pub, unused_qualifications, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("muster.v1");
}

pub use convert::WireError;
