//! What else may listen where a router is looked for: a server of HTTP/1, most likely the router's own. To gRPC it looks like
//! a router that breaks off, which is tried again for as long as a router may take to come back.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::transport::Uri;

/// For a connection and the beginning of an answer.
const PATIENCE: Duration = Duration::from_secs(2);
const HTTP1: &[u8] = b"HTTP/1.";

/// Whether a question in HTTP/1 is answered in it at this address (`http://host:port`). Where nobody answers, it is not.
pub(crate) async fn speaks_http1(url: &str) -> bool {
    let Ok(uri) = url.parse::<Uri>() else { return false };
    let (Some("http"), Some(host)) = (uri.scheme_str(), uri.host()) else { return false };
    let authority = format!("{host}:{}", uri.port_u16().unwrap_or(80));
    let asking = async {
        let mut stream = TcpStream::connect(&authority).await?;
        let request = format!("GET / HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut beginning = [0; HTTP1.len()];
        stream.read_exact(&mut beginning).await?;
        Ok::<_, std::io::Error>(beginning)
    };
    let answer = tokio::time::timeout(PATIENCE, asking).await;
    answer.is_ok_and(|answer| answer.is_ok_and(|beginning| beginning == HTTP1))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// The address of a server that says this to whoever connects, once, and closes.
    async fn saying(said: &'static [u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 512];
            let _ = stream.read(&mut asked).await;
            stream.write_all(said).await.unwrap();
        });
        format!("http://{address}")
    }

    #[tokio::test]
    async fn servers_of_http1_are_told_from_others() {
        assert!(speaks_http1(&saying(b"HTTP/1.1 404 Not Found\r\n\r\n").await).await);
        assert!(speaks_http1(&saying(b"HTTP/1.0 400 Bad Request\r\n\r\n").await).await);
        // HTTP/2 begins with its settings.
        for other in [&b"\0\0\x12\x04\0\0\0\0\0"[..], b"", b"HTTP", b"SSH-2.0-x\r\n"] {
            assert!(!speaks_http1(&saying(other).await).await, "{other:?}");
        }
        for nobody in ["http://127.0.0.1:1", "https://127.0.0.1:1", "nonsense", ""] {
            assert!(!speaks_http1(nobody).await, "{nobody}");
        }
    }
}
