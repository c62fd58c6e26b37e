//! Errors of text. Messages name the file or field, the value and, where there is one, the remedy; a retry
//! helps none of them.

/// An error of this crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// A file of the model directory is larger than its cap.
    #[error("{file} is {bytes} bytes, at most {limit} are read")]
    FileTooLarge {
        /// Name of the file.
        file: &'static str,
        /// Its size.
        bytes: usize,
        /// The cap.
        limit: usize,
    },
    /// A file of the model directory cannot be understood.
    #[error("{file}: {reason}")]
    InvalidFile {
        /// Name of the file.
        file: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A text has a token that the model has no embedding for.
    #[error(
        "the token {token:?} has id {id}, and the model knows ids below {vocab} only (`vocab_size` in config.json): \
         leave it out"
    )]
    TokenBeyondVocab {
        /// The token's text.
        token: String,
        /// Its id.
        id: u32,
        /// Ids are below this.
        vocab: u32,
    },
    /// The text to encode is longer than this crate ever accepts.
    #[error("text is {bytes} bytes, at most {limit} can be tokenized")]
    TextTooLong {
        /// Its length.
        bytes: usize,
        /// The cap.
        limit: usize,
    },
    /// The text has more tokens than allowed.
    #[error("has {least} tokens or more; at most {most} are allowed")]
    TooManyTokens {
        /// Tokens that it has at least.
        least: usize,
        /// Most that are allowed.
        most: usize,
    },
    /// The text has too long a part without a seam.
    #[error(
        "has {bytes} bytes without a place to divide them, such as a space between two words; at most {limit} can be \
         tokenized at once"
    )]
    StretchTooLong {
        /// Bytes of that part.
        bytes: usize,
        /// Most that are taken.
        limit: usize,
    },
    /// The caller is gone.
    #[error("nobody waits for it any more")]
    Unwanted,
    /// The tokenizer refused a text.
    #[error("tokenizer: {reason}")]
    Encode {
        /// The tokenizer's words.
        reason: String,
    },
    /// An id to decode is not one of the model's.
    #[error("token id {id} is not below the vocabulary size {vocab}")]
    UnknownId {
        /// The id.
        id: u32,
        /// Ids are below this.
        vocab: u32,
    },
    /// The model has no chat template.
    #[error(
        "the model has no chat template: send a plain prompt, or put a chat_template.jinja into the model directory"
    )]
    NoChatTemplate,
    /// The template itself refused the conversation (`raise_exception`), in its own words.
    #[error("{message}")]
    Template {
        /// The template's message.
        message: String,
    },
    /// The template is malformed, failed on this conversation, or went past one of the limits on templates.
    #[error("chat template: {reason}")]
    TemplateFailed {
        /// What happened, with the line where known.
        reason: String,
    },
    /// The conversation comes with tools, and the template has no place for them.
    #[error("the model's chat template does not take tools: leave them out, or describe them in a message")]
    ToolsNotTaken,
    /// The conversation has calls of tools, and the template has no place for them.
    #[error("the model's chat template does not write tool calls: put them into the content of the message")]
    ToolCallsNotTaken,
    /// A call's arguments are not what calls have.
    #[error("the arguments of a call of {function:?} must be the JSON of an object: {reason}")]
    Arguments {
        /// The function, cut to 64 characters.
        function: String,
        /// What is wrong with them.
        reason: String,
    },
    /// A value for the template is nested too deeply.
    #[error("{what} is nested more than {limit} deep")]
    TooDeep {
        /// Which: `tools`, or the name of a variable.
        what: String,
        /// The cap.
        limit: usize,
    },
    /// A variable of the template has the name of something else.
    #[error("{name} is not a variable that can be set")]
    Reserved {
        /// Its name.
        name: String,
    },
}
