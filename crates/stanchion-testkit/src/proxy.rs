//! A TCP proxy that loses, holds back and cuts, between a client and a real server.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::environment::Random;

/// How often a thread that waits looks at what it should do.
const LOOK: Duration = Duration::from_millis(2);

/// What a proxy does to what passes. Everything can be changed while it runs.
#[derive(Debug)]
pub struct Faults {
    /// Of a thousand answers so many are lost: the request was done, the connection breaks instead of the answer.
    lose_answers: AtomicU32,
    /// Of a thousand requests so many are lost with their connection.
    lose_requests: AtomicU32,
    /// Nothing passes, connections stay: a link that is dead, and nobody says so.
    is_silent: AtomicBool,
    /// Requests pass, their answers wait.
    holds_answers: AtomicBool,
    /// New connections are closed at once.
    refuses: AtomicBool,
    /// Where new connections lead.
    to: AtomicU16,
    /// Each answer comes so many milliseconds later.
    delay: AtomicU64,
    /// Raised to break what is connected now.
    generation: AtomicU64,
    /// Raised to silence what is connected now.
    strandings: AtomicU64,
    lost: AtomicU64,
    connections: AtomicU64,
    /// Redis commands that the server is not asked to do, in capitals, and what is answered to each.
    refused: Mutex<Vec<(String, String)>>,
    random: Mutex<Random>,
    ended: AtomicBool,
}

impl Faults {
    /// Of a thousand answers so many are lost with their connection.
    pub fn lose_answers(&self, per_mille: u32) {
        self.lose_answers.store(per_mille, Ordering::SeqCst);
    }

    /// Of a thousand requests so many are lost with their connection.
    pub fn lose_requests(&self, per_mille: u32) {
        self.lose_requests.store(per_mille, Ordering::SeqCst);
    }

    /// Lets nothing pass, or lets it pass again: what was sent meanwhile arrives then.
    pub fn silence(&self, is_silent: bool) {
        self.is_silent.store(is_silent, Ordering::SeqCst);
    }

    /// Requests pass and answers wait here, or come now.
    pub fn hold_answers(&self, holds: bool) {
        self.holds_answers.store(holds, Ordering::SeqCst);
    }

    /// New connections lead to the server at this port; those there are stay where they are.
    pub fn lead_to(&self, port: u16) {
        self.to.store(port, Ordering::SeqCst);
    }

    /// Closes new connections at once, or no longer.
    pub fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }

    /// Answers come so much later.
    pub fn delay_answers(&self, by: Duration) {
        self.delay.store(by.as_millis() as u64, Ordering::SeqCst);
    }

    /// New connections, to a Redis server, get this error for this command, as from a proxy or a managed service that lacks it.
    pub fn refuse_command(&self, name: &str, error: &str) {
        self.refused.lock().unwrap().push((name.to_uppercase(), error.to_owned()));
    }

    /// Breaks all connections there are.
    pub fn cut(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Lets nothing pass any more on the connections that there are, which stay: as when a firewall has forgotten them.
    pub fn strand(&self) {
        self.strandings.fetch_add(1, Ordering::SeqCst);
    }

    /// How many answers and requests were lost.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::SeqCst)
    }

    /// How many connections were made.
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
    /// Starts a proxy to this port; `seed` decides what is lost.
    ///
    /// # Panics
    /// When it cannot listen.
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

    /// Where it listens on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What it does.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.faults.ended.store(true, Ordering::SeqCst);
        self.faults.cut();
        let _wakes_the_listener = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// Passes on what comes, until one side ends or a fault does.
fn pass(mut from: TcpStream, mut to: TcpStream, is_request: bool, faults: &Faults) {
    let (generation, strandings) = (faults.generation.load(Ordering::SeqCst), faults.strandings.load(Ordering::SeqCst));
    let (per_mille, delay) = match is_request {
        true => (&faults.lose_requests, None),
        false => (&faults.lose_answers, Some(&faults.delay)),
    };
    let is_cut = || faults.generation.load(Ordering::SeqCst) != generation;
    let _without_these_it_is_slower = (from.set_nodelay(true), to.set_nodelay(true));
    let _looked_at_often = from.set_read_timeout(Some(LOOK * 10));
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
            std::thread::sleep(LOOK);
        }
        if is_cut() || faults.loses(per_mille) || to.write_all(filter.pass(&buffer[..length])).is_err() {
            break;
        }
    }
    let _closed = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// Has commands of Redis refused: the server gets a script in their place that answers the error, so that answers stay in order.
#[derive(Debug, Default)]
struct CommandFilter {
    refused: Vec<(String, String)>,
    /// The received bytes of an incomplete command.
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

/// The name in capitals of the command that the bytes begin with, and its length, if it is there whole.
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
