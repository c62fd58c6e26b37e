//! Who a process is, whom it talks to, and who may ask it for something.
//!
//! Inside a cluster a process is known by a certificate of the cluster's own authority, whose URI name says its role
//! ([`PeerId`]); addresses and host names say nothing, for they change. Outside, a client shows an API key or a
//! certificate ([`Access`]). Files are read whole, checked whole, and taken into use whole; when they change they are
//! read again, and what is wrong then changes nothing ([`Reloaded`]). Knows nothing of gRPC, HTTP or sockets.

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
