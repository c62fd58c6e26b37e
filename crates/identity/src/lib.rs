//! Identity of processes, of their peers, and access of clients.
//!
//! Inside a cluster a process is known by a certificate of the cluster's own authority, whose URI name says its role
//! ([`PeerId`]); addresses and host names do not count, for they change. Outside, a client sends an API key or a
//! certificate ([`Access`]). Files are read, checked and taken into use as a whole; changed files are read again, and
//! invalid ones change nothing ([`Reloaded`]). Knows nothing of gRPC, HTTP or sockets.

mod access;
mod issue;
mod keys;
mod material;
mod peer;
mod reloaded;
mod tls;

pub use access::{Access, Denied};
pub use issue::{Authority, IssueError, Issued, has_names, is_ending};
pub use keys::{ApiKeys, KeyError, KeysError, NewKey, key_line};
pub use material::{IdentityError, Material, TlsFiles};
pub use peer::{PeerId, PeerIdError, Role};
pub use reloaded::{Reload, Reloaded};
pub use tls::{Clients, Identity, peer_of};
