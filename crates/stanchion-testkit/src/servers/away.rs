//! Provides addresses that do not serve, each in a different way.

use std::net::{SocketAddr, TcpListener, TcpStream};

use super::free_port;

/// An unavailable server.
#[derive(Debug)]
pub struct Away {
    /// Name of the way in which the server is unavailable.
    pub name: &'static str,
    /// Host and port, as in a URL.
    pub address: String,
    /// Sockets that keep the port in this state.
    _keep: (Option<TcpListener>, Vec<TcpStream>),
}

impl Away {
    /// Returns a server for each way to be unavailable.
    pub fn all() -> Vec<Self> {
        vec![Self::refused(), Self::silent(), Self::full(), Self::unknown()]
    }

    /// Returns a port on which no process listens.
    pub fn refused() -> Self {
        Self { name: "refused", address: format!("127.0.0.1:{}", free_port()), _keep: (None, Vec::new()) }
    }

    /// Returns a server that accepts connections and never replies.
    ///
    /// # Panics
    /// If no port is free.
    pub fn silent() -> Self {
        // The kernel accepts connections of a listening socket.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        Self { name: "silent", address, _keep: (Some(listener), Vec::new()) }
    }

    /// Returns a server that does not answer packets, like a firewall: its queue of unaccepted connections is full.
    ///
    /// # Panics
    /// If no port is free.
    pub fn full() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let listener = runtime.block_on(async {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
            socket.listen(0).unwrap().into_std().unwrap()
        });
        let address = listener.local_addr().unwrap();
        let limit = std::time::Duration::from_millis(200);
        let mut waiting = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, limit) {
            waiting.push(stream);
            assert!(waiting.len() < 100, "this system has no limit on unaccepted connections");
        }
        Self { name: "full", address: address.to_string(), _keep: (Some(listener), waiting) }
    }

    /// Returns a host name that does not resolve.
    pub fn unknown() -> Self {
        Self { name: "unknown", address: "stanchion.invalid:4711".into(), _keep: (None, Vec::new()) }
    }
}
