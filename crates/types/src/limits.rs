//! Caps on everything that comes from outside. Checked before anything is allocated or indexed.

/// Hard caps on one public request and on one router's sequences. Counts unless said otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one HTTP body or gRPC message on the public side.
    pub body_bytes: usize,
    /// Bytes of one prompt's text, checked before tokenization.
    pub prompt_bytes: usize,
    /// Completions per request: prompts times `n`.
    pub choices: u32,
    /// Stop strings or stop ids per request.
    pub stops: usize,
    /// Tokens that `logit_bias` may name.
    pub bias: usize,
    /// Bytes of one stop string.
    pub stop_bytes: usize,
    /// Alternatives reported per token.
    pub top_logprobs: u32,
    /// Messages of one chat request.
    pub messages: usize,
    /// Sequences waiting for a place in the batch. Excess ones are shed with a retryable error.
    pub queue: usize,
    /// Sequences in the batch at once.
    pub running: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 8 << 20,
            prompt_bytes: 4 << 20,
            choices: 256,
            stops: 16,
            bias: 1024,
            stop_bytes: 256,
            top_logprobs: 20,
            messages: 1024,
            queue: 1024,
            running: 256,
        }
    }
}
