//! Text in, token ids out, and back: tokenizer, incremental detokenizer, stop strings, chat templates.
//!
//! Owns the reading of `tokenizer.json`, of the files beside it and of chat templates from bytes, and
//! everything that turns ids into text. Always holds: the same bytes and the same text give the same ids
//! (no clock, environment or randomness is read here); a [`Detokenizer`]'s pieces joined are what
//! [`Tokenizer::decode`] gives for the same ids. Knows nothing about files, requests, threads of the
//! caller, or which ids end a generation.
//!
//! All calls are synchronous and may take milliseconds for long text: keep them off async threads.

mod added;
mod adjacent;
mod around;
mod chat;
mod config;
mod date;
mod declared;
mod detokenizer;
mod error;
mod files;
mod floor;
mod growth;
mod json;
mod library;
mod pieces;
mod probe;
mod python;
mod seams;
mod source;
mod special;
mod stops;
mod template;
mod tojson;
mod tokenizer;
mod trial;
mod wide_stack;

pub use chat::{Chat, ChatMessage, Content, ToolCall};
pub use date::CivilDate;
pub use detokenizer::Detokenizer;
pub use error::TextError;
pub use files::TokenizerFiles;
pub use json::BoundedJson;
pub use special::{SpecialText, SpecialToken, SpecialTokens};
pub use stops::{StopMatcher, StopOutcome};
pub use template::{ChatTemplate, GenerationPrompt};
pub use tokenizer::{Bounds, Special, Tokenizer};
pub use trial::RoleTrial;
