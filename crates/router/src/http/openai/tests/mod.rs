//! Both directions of the translation, without a socket.

mod answers;
mod classes;
mod requests;
