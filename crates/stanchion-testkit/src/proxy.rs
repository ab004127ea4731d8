//! Runs a TCP proxy between a client and a real server that loses, delays, holds and cuts traffic.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::environment::Random;

/// Interval at which a waiting thread checks the faults.
const CHECK_INTERVAL: Duration = Duration::from_millis(2);

/// The faults of a proxy. They can be changed while the proxy runs.
#[derive(Debug)]
pub struct Faults {
    /// Number of replies, out of 1,000, that are lost: the server executes the request, and the connection breaks.
    lose_answers: AtomicU32,
    /// Number of requests, out of 1,000, that are lost together with their connection.
    lose_requests: AtomicU32,
    /// Whether nothing passes although connections stay open, as on a link that is dead without notice.
    is_silent: AtomicBool,
    /// Whether replies wait in the proxy while requests pass.
    holds_answers: AtomicBool,
    /// Whether new connections are closed at once.
    refuses: AtomicBool,
    /// Port to which new connections lead.
    to: AtomicU16,
    /// Delay of each reply, in milliseconds.
    delay: AtomicU64,
    /// Incremented to break the current connections.
    generation: AtomicU64,
    /// Incremented to silence the current connections.
    strandings: AtomicU64,
    lost: AtomicU64,
    connections: AtomicU64,
    /// Redis commands, in capitals, that do not reach the server, and the error that the client gets for each.
    refused: Mutex<Vec<(String, String)>>,
    random: Mutex<Random>,
    ended: AtomicBool,
}

impl Faults {
    /// Sets the number of replies, out of 1,000, that are lost together with their connection.
    pub fn lose_answers(&self, per_mille: u32) {
        self.lose_answers.store(per_mille, Ordering::SeqCst);
    }

    /// Sets the number of requests, out of 1,000, that are lost together with their connection.
    pub fn lose_requests(&self, per_mille: u32) {
        self.lose_requests.store(per_mille, Ordering::SeqCst);
    }

    /// Stops or resumes all traffic. Data that was sent in between arrives after the resume.
    pub fn silence(&self, is_silent: bool) {
        self.is_silent.store(is_silent, Ordering::SeqCst);
    }

    /// Holds replies in the proxy while requests pass, or sends the held replies.
    pub fn hold_answers(&self, holds: bool) {
        self.holds_answers.store(holds, Ordering::SeqCst);
    }

    /// Sends new connections to the server at this port. Current connections stay with their server.
    pub fn lead_to(&self, port: u16) {
        self.to.store(port, Ordering::SeqCst);
    }

    /// Sets whether new connections are closed at once.
    pub fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }

    /// Delays each reply by this time.
    pub fn delay_answers(&self, by: Duration) {
        self.delay.store(by.as_millis() as u64, Ordering::SeqCst);
    }

    /// Answers a Redis command with an error on new connections, like a proxy or a managed service that lacks the
    /// command.
    pub fn refuse_command(&self, name: &str, error: &str) {
        self.refused.lock().unwrap().push((name.to_uppercase(), error.to_owned()));
    }

    /// Breaks all current connections.
    pub fn cut(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Stops all traffic on the current connections, which stay open, like a firewall that has forgotten them.
    pub fn strand(&self) {
        self.strandings.fetch_add(1, Ordering::SeqCst);
    }

    /// Returns the number of replies and requests that were lost.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::SeqCst)
    }

    /// Returns the number of connections that clients made.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::SeqCst)
    }

    fn loses(&self, per_mille: &AtomicU32) -> bool {
        let loses = self.random.lock().unwrap().below(1_000) < u64::from(per_mille.load(Ordering::SeqCst));
        self.lost.fetch_add(u64::from(loses), Ordering::SeqCst);
        loses
    }
}

/// A proxy to one server.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    faults: Arc<Faults>,
}

impl Proxy {
    /// Starts a proxy to this port. `seed` determines which messages are lost.
    ///
    /// # Panics
    /// If the proxy cannot listen.
    pub fn start(to: u16, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let faults = Arc::new(Faults {
            lose_answers: AtomicU32::new(0),
            lose_requests: AtomicU32::new(0),
            is_silent: AtomicBool::new(false),
            holds_answers: AtomicBool::new(false),
            to: AtomicU16::new(to),
            refuses: AtomicBool::new(false),
            delay: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            strandings: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            refused: Mutex::default(),
            random: Mutex::new(Random::new(seed)),
            ended: AtomicBool::new(false),
        });
        std::thread::spawn({
            let faults = faults.clone();
            move || {
                for client in listener.incoming() {
                    if faults.ended.load(Ordering::SeqCst) {
                        return;
                    }
                    let Ok(client) = client else { continue };
                    faults.connections.fetch_add(1, Ordering::SeqCst);
                    if faults.refuses.load(Ordering::SeqCst) {
                        continue;
                    }
                    let Ok(server) = TcpStream::connect(("127.0.0.1", faults.to.load(Ordering::SeqCst))) else {
                        continue;
                    };
                    let pairs = [(client.try_clone(), server.try_clone(), true), (Ok(server), Ok(client), false)];
                    for (from, to, is_request) in pairs {
                        let (Ok(from), Ok(to)) = (from, to) else { continue };
                        let faults = faults.clone();
                        std::thread::spawn(move || pass(from, to, is_request, &faults));
                    }
                }
            }
        });
        Self { port, faults }
    }

    /// Returns its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the faults, to change them.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.faults.ended.store(true, Ordering::SeqCst);
        self.faults.cut();
        let _ = TcpStream::connect(("127.0.0.1", self.port)); // wakes the listener, which then ends
    }
}

/// Forwards data until one side closes the connection or a fault breaks it.
fn pass(mut from: TcpStream, mut to: TcpStream, is_request: bool, faults: &Faults) {
    let (generation, strandings) = (faults.generation.load(Ordering::SeqCst), faults.strandings.load(Ordering::SeqCst));
    let (per_mille, delay) = match is_request {
        true => (&faults.lose_requests, None),
        false => (&faults.lose_answers, Some(&faults.delay)),
    };
    let is_cut = || faults.generation.load(Ordering::SeqCst) != generation;
    let _ = (from.set_nodelay(true), to.set_nodelay(true)); // only makes the proxy faster
    let _ = from.set_read_timeout(Some(CHECK_INTERVAL * 10)); // so that an idle connection notices a cut
    let mut buffer = vec![0; 64 * 1024];
    let mut filter = CommandFilter { refused: faults.refused.lock().unwrap().clone(), ..CommandFilter::default() };
    filter.refused.retain(|_| is_request);
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if is_cut() {
                    break;
                }
                continue;
            }
            Err(_) => break,
        };
        if let Some(delay) = delay {
            std::thread::sleep(Duration::from_millis(delay.load(Ordering::SeqCst)));
        }
        let is_held = || {
            faults.is_silent.load(Ordering::SeqCst)
                || faults.strandings.load(Ordering::SeqCst) != strandings
                || !is_request && faults.holds_answers.load(Ordering::SeqCst)
        };
        while is_held() && !is_cut() {
            std::thread::sleep(CHECK_INTERVAL);
        }
        if is_cut() || faults.loses(per_mille) || to.write_all(filter.pass(&buffer[..length])).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both)); // one of them may be closed already
}

/// Replaces rejected Redis commands by a script that returns the error, so that replies stay in order.
#[derive(Debug, Default)]
struct CommandFilter {
    refused: Vec<(String, String)>,
    /// Received bytes of an incomplete command.
    begun: Vec<u8>,
    passed: Vec<u8>,
}

impl CommandFilter {
    fn pass<'a>(&'a mut self, bytes: &'a [u8]) -> &'a [u8] {
        if self.refused.is_empty() {
            return bytes;
        }
        self.begun.extend_from_slice(bytes);
        self.passed.clear();
        let mut rest = self.begun.as_slice();
        while let Some((name, length)) = command(rest) {
            match self.refused.iter().find(|(refused, _)| *refused == name) {
                Some((_, error)) => self.passed.extend_from_slice(&refusal(error)),
                None => self.passed.extend_from_slice(&rest[..length]),
            }
            rest = &rest[length..];
        }
        self.begun = rest.to_vec();
        &self.passed
    }
}

/// Returns the name, in capitals, and the length of the first command of the bytes, if the command is complete.
fn command(bytes: &[u8]) -> Option<(String, usize)> {
    let line = |at: usize| {
        let length = bytes.get(at..)?.windows(2).position(|two| two == b"\r\n")?;
        let number: usize = std::str::from_utf8(&bytes[at + 1..at + length]).unwrap().parse().unwrap();
        Some((number, at + length + 2))
    };
    let (count, mut at) = line(0)?;
    let mut name = None;
    for _ in 0..count {
        let (length, start) = line(at)?;
        let word = bytes.get(start..start + length)?;
        name.get_or_insert_with(|| String::from_utf8_lossy(word).to_uppercase());
        at = start + length + 2;
    }
    (at <= bytes.len()).then_some((name?, at))
}

fn refusal(error: &str) -> Vec<u8> {
    let words = ["EVAL", "return redis.error_reply(ARGV[1])", "0", error];
    let mut command = format!("*{}\r\n", words.len());
    for word in words {
        command += &format!("${}\r\n{word}\r\n", word.len());
    }
    command.into_bytes()
}
