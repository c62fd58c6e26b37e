//! A client of one or several routers whose streams survive the loss of one.
//!
//! Owns connections, deadlines, retries with back-off, and *resuming*: a broken stream goes on at another router, or at the
//! same one when that is back, behind the last delivered token. Always holds: the events of
//! a [`Generation`] are those of one undisturbed stream. Indices count up from 0 without a gap, no token comes twice,
//! every choice has one end; a router that sends anything else is an error, not an event.
//!
//! Routers that are named together must serve the same model in the same way; one that does not is detected before any of its
//! tokens is delivered. Knows nothing of models, prompts or text.
//!
//! ```no_run
//! # use muster_client::{Client, ClientError, Policy};
//! # async fn example(request: muster_proto::v1::GenerateRequest) -> Result<(), ClientError> {
//! let routers = ["10.0.0.1:50051".to_owned(), "10.0.0.2:50051".to_owned()];
//! let client = Client::connect(&routers, Policy::default()).await?;
//! let mut generation = client.generate(request).await?;
//! while let Some(event) = generation.next().await? { /* each token once, in order, whichever router sent it */ }
//! # Ok(())
//! # }
//! ```

mod attempts;
mod credentials;
mod error;
mod generation;
mod policy;
mod progress;
mod routers;
mod trouble;

pub use credentials::Credentials;
pub use error::ClientError;
pub use generation::Generation;
pub use policy::Policy;
pub use progress::Event;
pub use routers::Client;
