//! Sockets that listen, with a backlog of our choice: libraries' own is as low as 128, and a burst beyond it costs clients
//! a second each.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use tokio::net::{TcpListener, TcpSocket, UnixListener, UnixSocket};

/// Connections that the system keeps until they are accepted; less where `net.core.somaxconn` is lower.
pub const BACKLOG: u32 = 4096;

/// Listens on an address.
///
/// # Errors
/// The system's.
pub fn tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // Connections of a process before this one may still be closing.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Listens on the first usable address of a name.
///
/// # Errors
/// The system's, of the last address.
pub async fn tcp_named(host: &str, port: u16) -> io::Result<TcpListener> {
    let mut outcome = Err(io::Error::new(io::ErrorKind::InvalidInput, "the name has no address"));
    for address in tokio::net::lookup_host((host, port)).await? {
        outcome = tcp(address);
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}

/// Listens on a path.
///
/// # Errors
/// The system's.
pub fn unix(path: &Path) -> io::Result<UnixListener> {
    let socket = UnixSocket::new_stream()?;
    socket.bind(path)?;
    socket.listen(BACKLOG)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    /// What the system allows.
    fn wanted() -> u32 {
        let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").expect("Linux has it");
        most.trim().parse::<u32>().expect("a number").min(BACKLOG)
    }

    /// The system's word on a socket that listens.
    fn backlog(listener: &TcpListener) -> u32 {
        // SAFETY: plain numbers, for which zeros are values.
        let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
        let mut size = size_of_val(&info) as libc::socklen_t;
        // SAFETY: the descriptor is open; the system writes at most `size` bytes into `info`.
        let got = unsafe {
            let (fd, info) = (listener.as_raw_fd(), (&raw mut info).cast());
            libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info, &raw mut size)
        };
        assert_eq!(got, 0, "{}", io::Error::last_os_error());
        // Of a socket that listens, this is the length of its queue.
        info.tcpi_sacked
    }

    #[tokio::test]
    async fn tcp_listeners_have_the_backlog_that_was_asked_for() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = tcp(address.parse().unwrap()) else { continue };
            assert_eq!(backlog(&listener), wanted(), "{address}");
        }
        assert_eq!(backlog(&tcp_named("localhost", 0).await.unwrap()), wanted());
    }

    #[tokio::test]
    async fn unix_listeners_keep_a_burst() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _listener = unix(&path).unwrap();
        let mut burst = Vec::new();
        for _ in 0..wanted().min(1000) {
            // Beyond the backlog this fails at once.
            burst.push(tokio::net::UnixStream::connect(&path).await.unwrap());
        }
    }
}
