//! Servers that are away, each in its own way.

use std::net::{SocketAddr, TcpListener, TcpStream};

use super::free_port;

/// A server that does not serve.
#[derive(Debug)]
pub struct Away {
    /// How it is away.
    pub name: &'static str,
    /// Its host and port, as a URL has them.
    pub address: String,
    /// Keeps the port as it is.
    _keep: (Option<TcpListener>, Vec<TcpStream>),
}

impl Away {
    /// Every way to be away.
    pub fn all() -> Vec<Self> {
        vec![Self::refused(), Self::silent(), Self::full(), Self::unknown()]
    }

    /// Nobody listens.
    pub fn refused() -> Self {
        Self { name: "refused", address: format!("127.0.0.1:{}", free_port()), _keep: (None, Vec::new()) }
    }

    /// Connections are accepted, and nothing is ever answered.
    ///
    /// # Panics
    /// When there is no port.
    pub fn silent() -> Self {
        // The kernel accepts.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        Self { name: "silent", address, _keep: (Some(listener), Vec::new()) }
    }

    /// Packets get no answer, as behind a firewall: the queue of connections that nobody accepts is full.
    ///
    /// # Panics
    /// When there is no port.
    pub fn full() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        let listener = runtime.block_on(async {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
            socket.listen(0).unwrap().into_std().unwrap()
        });
        let address = listener.local_addr().unwrap();
        let patience = std::time::Duration::from_millis(200);
        let mut waiting = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, patience) {
            waiting.push(stream);
            assert!(waiting.len() < 100, "this system accepts without end");
        }
        Self { name: "full", address: address.to_string(), _keep: (Some(listener), waiting) }
    }

    /// A name that does not resolve.
    pub fn unknown() -> Self {
        Self { name: "unknown", address: "stanchion.invalid:4711".into(), _keep: (None, Vec::new()) }
    }
}
