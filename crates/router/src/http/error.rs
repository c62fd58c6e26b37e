//! Errors of the HTTP edge: a status, OpenAI's error object and, where waiting helps, a retry delay.
//!
//! Messages name a field and its remedy. Quotes of the request are cut, so that an error is never large.

use std::fmt::Display;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use muster_identity::Denied;
use muster_types::Retry;
use serde::Serialize;

use crate::request::{Fault, RequestError, count_refusal};

/// Most characters of a message; longer ones quote the client's own input.
const MESSAGE_CHARS: usize = 400;

/// Seconds before a client's retry: a full queue of short requests drains in about that time.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// Header by which OpenAI's client libraries decide on automatic retries.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// A failed HTTP request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    pub(super) body: ErrorBody,
    retry: Retry,
}

/// OpenAI's error object.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct ErrorBody {
    pub(super) message: String,
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) param: Option<String>,
    pub(super) code: Option<&'static str>,
}

/// The JSON document: `{"error": {…}}`.
#[derive(Serialize)]
pub(super) struct Envelope<'a> {
    error: &'a ErrorBody,
}

impl ApiError {
    fn new(status: StatusCode, retry: Retry, message: impl Display) -> Self {
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let body = ErrorBody { message: cut(&message.to_string()), kind, param: None, code: None };
        Self { status, body, retry }
    }

    /// A body that cannot be read as a request.
    pub(super) fn bad_body(message: impl Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, Retry::Never, message)
    }

    /// A refusal of one field.
    pub(super) fn field(param: &str, message: impl Display) -> Self {
        Self::inside(param, "", message)
    }

    /// A refusal of a value inside a field, at `place` (`[0].content`); empty for the field itself.
    pub(super) fn inside(param: &str, place: &str, message: impl Display) -> Self {
        let error = Self::bad_body(format_args!("{}{}: {message}", cut(param), cut(place)));
        Self { body: ErrorBody { param: Some(cut(param)), ..error.body }, ..error }
    }

    /// An unknown field, in OpenAI's words, with a suggestion.
    pub(super) fn unrecognized(name: &str, meant: Option<&str>) -> Self {
        let name = cut(name);
        let error = match meant {
            Some(meant) => {
                Self::bad_body(format_args!("Unrecognized request argument supplied: {name}; {meant}"))
            }
            None => Self::bad_body(format_args!("Unrecognized request argument supplied: {name}")),
        };
        Self { body: ErrorBody { param: Some(name), ..error.body }, ..error }
    }

    /// The same error with the field that the client gave instead of `field`.
    pub(super) fn about(mut self, field: &'static str, given: &'static str) -> Self {
        if field != given && self.body.param.as_deref() == Some(field) {
            self.body.message = self.body.message.replacen(field, given, 1);
            self.body.param = Some(given.to_owned());
        }
        self
    }

    /// A status with its text.
    pub(super) fn status(status: StatusCode, message: impl Display) -> Self {
        Self::new(status, Retry::Never, message)
    }

    /// A caller without access.
    pub(super) fn denied(denied: &Denied) -> Self {
        match denied {
            Denied::Nothing | Denied::Scheme | Denied::Header { .. } | Denied::Key => {
                Self::status(StatusCode::UNAUTHORIZED, denied).with_code("invalid_api_key")
            }
            Denied::Role { .. } => Self::status(StatusCode::FORBIDDEN, denied).with_code("permission_denied"),
        }
    }

    /// The router is overloaded.
    pub(super) fn busy(message: impl Display) -> Self {
        count_refusal("body");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, Retry::Later, message).with_code("overloaded")
    }

    fn with_code(mut self, code: &'static str) -> Self {
        self.body.code = Some(code);
        self
    }

    /// The error as an event of a stream that has begun.
    pub(super) fn envelope(&self) -> Envelope<'_> {
        Envelope { error: &self.body }
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let retry = error.retry();
        let status = match error {
            RequestError::Invalid { .. } => StatusCode::BAD_REQUEST,
            RequestError::UnknownModel { .. } => StatusCode::NOT_FOUND,
            RequestError::Overloaded(_) => StatusCode::TOO_MANY_REQUESTS,
            RequestError::ExpertsUnavailable(_)
            | RequestError::NumericsChanged
            | RequestError::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
            RequestError::Refused(_) | RequestError::NonFinite | RequestError::Internal => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        };
        let mut answer = Self::new(status, retry, &error);
        answer.body.code = match error {
            RequestError::Invalid { fault: Fault::Value, .. } => None,
            RequestError::Invalid { fault: Fault::Length, .. } => Some("context_length_exceeded"),
            RequestError::UnknownModel { .. } => Some("model_not_found"),
            RequestError::Overloaded(_) => Some("rate_limit_exceeded"),
            RequestError::ExpertsUnavailable(_) => Some("experts_unavailable"),
            RequestError::NumericsChanged => Some("numerics_changed"),
            RequestError::Refused(_) => Some("experts_refused"),
            RequestError::ShuttingDown => Some("shutting_down"),
            RequestError::NonFinite => Some("non_finite"),
            RequestError::Internal => Some("internal_error"),
        };
        answer.body.param = match error {
            RequestError::Invalid { field, .. } => Some(field.to_owned()),
            RequestError::UnknownModel { .. } => Some("model".to_owned()),
            _ => None,
        };
        answer
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.envelope())).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, RETRY_AFTER);
        } else if self.status.is_server_error() && self.retry == Retry::Never {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        response
    }
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(MESSAGE_CHARS) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::request::Overload;

    #[test]
    fn every_request_error_has_its_status_and_advice() {
        let unknown = RequestError::UnknownModel { asked: "b".into(), served: "a".into() };
        let wait = Overload::Wait { expected: Duration::from_secs(9), limit: Duration::from_secs(5) };
        let cases = [
            (RequestError::invalid("n", "is 0"), Retry::Never, 400, Some("n"), false),
            (unknown, Retry::Never, 404, Some("model"), false),
            (RequestError::Overloaded(Overload::Queue { limit: 3 }), Retry::Later, 429, None, true),
            (RequestError::Overloaded(wait), Retry::Later, 429, None, true),
            (RequestError::Overloaded(Overload::Text), Retry::Later, 429, None, true),
            (RequestError::ExpertsUnavailable("a worker was lost".into()), Retry::Later, 503, None, true),
            (RequestError::Refused("a worker refused it".into()), Retry::Never, 500, None, false),
            (RequestError::NumericsChanged, Retry::Later, 503, None, true),
            (RequestError::ShuttingDown, Retry::Elsewhere, 503, None, true),
            (RequestError::NonFinite, Retry::Never, 500, None, false),
            (RequestError::Internal, Retry::Elsewhere, 500, None, false),
        ];
        for (error, retry, status, param, retry_after) in cases {
            assert_eq!(error.retry(), retry, "{error}");
            let answer = ApiError::from(error.clone());
            assert_eq!(answer.status.as_u16(), status, "{error}");
            assert_eq!(answer.body.param.as_deref(), param, "{error}");
            let response = answer.into_response();
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), retry_after, "{error}");
        }
    }

    #[test]
    fn a_client_library_is_told_not_to_repeat_what_cannot_succeed() {
        for error in [RequestError::NonFinite, RequestError::Refused("a worker refused it".into())] {
            let response = ApiError::from(error).into_response();
            assert_eq!(response.headers()[SHOULD_RETRY], "false");
        }
        let response = ApiError::from(RequestError::Internal).into_response();
        assert!(!response.headers().contains_key(SHOULD_RETRY));
    }

    #[test]
    fn errors_stay_small() {
        let long = "é".repeat(1 << 20);
        let error = ApiError::field(&long, &long);
        assert!(error.body.message.chars().count() <= MESSAGE_CHARS + 1);
        assert!(error.body.param.unwrap().chars().count() <= MESSAGE_CHARS + 1);
    }
}
