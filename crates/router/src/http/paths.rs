//! The served paths, and the error texts for others.

use axum::http::{Method, Uri};
use muster_types::nearest;

/// Every path with its method, except those with a model's name.
const SERVED: [(&str, &str); 9] = [
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/models", "GET"),
    ("/version", "GET"),
    ("/health", "GET"),
    ("/healthz", "GET"),
    ("/readyz", "GET"),
    ("/ping", "GET or POST"),
    ("/metrics", "GET"),
];

/// Most characters of a path that an error quotes.
const QUOTED: usize = 100;

/// Error text for an unknown path.
pub(super) fn nothing_at(uri: &Uri) -> String {
    let path = uri.path();
    let shown: String = path.chars().take(QUOTED).collect();
    format!("there is nothing at {shown}; {}", remedy(path))
}

/// Error text for a method that the path does not take.
pub(super) fn not_taken(method: &Method, uri: &Uri) -> String {
    let path: String = uri.path().chars().take(QUOTED).collect();
    let takes = SERVED.iter().find(|(served, _)| *served == path).map_or("GET", |(_, takes)| takes);
    format!("{path} does not take {method}; it takes {takes}")
}

fn remedy(path: &str) -> String {
    let bare = path.trim_end_matches('/');
    let served = || SERVED.iter().map(|(path, _)| *path);
    let is_model = |path: &str| path == "/v1/models" || path.starts_with("/v1/models/");
    let is_served = |path: &str| served().any(|one| one == path) || is_model(path);
    if bare != path && is_served(bare) {
        return format!("use {bare}, without the slash at its end");
    }
    if bare == "/v1" {
        return "this is the base URL of clients, which ask below it, as in /v1/models".to_owned();
    }
    let with_base = format!("/v1{bare}");
    if is_served(&with_base) {
        return format!("use {with_base}: the base URL of a client ends in /v1");
    }
    if let Some(end) = served().find(|end| bare.ends_with(end)) {
        return format!("use {end}: the base URL of a client is that of this router and /v1");
    }
    match nearest(bare, served()) {
        Some(near) => format!("did you mean {near}?"),
        None => format!("this router serves {}", served().collect::<Vec<_>>().join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_near_is_told_the_way() {
        for (path, told) in [
            ("/v1/completion", "did you mean /v1/completions?"),
            ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
            ("/v1/chat/completions/", "use /v1/chat/completions, without the slash at its end"),
            ("/healthz/", "use /healthz, without the slash at its end"),
            ("/chat/completions", "use /v1/chat/completions: the base URL of a client ends in /v1"),
            ("/models/", "use /v1/models: the base URL of a client ends in /v1"),
            ("/models/demo", "use /v1/models/demo: the base URL of a client ends in /v1"),
            ("/v1/v1/models", "use /v1/models: the base URL of a client is that of this router and /v1"),
            (
                "/openai/v1/completions",
                "use /v1/completions: the base URL of a client is that of this router and /v1",
            ),
            ("/v1", "this is the base URL of clients, which ask below it"),
            ("/v1/", "this is the base URL of clients, which ask below it"),
            ("/metric", "did you mean /metrics?"),
            ("/v1/embeddings", "this router serves /v1/chat/completions, "),
            ("/", "this router serves "),
        ] {
            let said = nothing_at(&path.parse().unwrap());
            assert!(said.starts_with(&format!("there is nothing at {path}; {told}")), "{said}");
        }
        let long = format!("/{}", "x".repeat(10_000));
        assert!(nothing_at(&long.parse().unwrap()).len() < 400);
        let said = not_taken(&Method::GET, &"/v1/completions".parse().unwrap());
        assert_eq!(said, "/v1/completions does not take GET; it takes POST");
    }
}
