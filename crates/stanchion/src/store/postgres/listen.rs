//! Pushes: LISTEN on the channel of a session, on a connection of its own.

use std::future::{Future, poll_fn};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio_postgres::types::Type;
use tokio_postgres::{AsyncMessage, Client, Connection, NoTls, Socket};

use super::config::{CONNECT_WITHIN, Config, Place, Tls};
use super::connect::{Pool, SERVER, sleep, within};
use super::error::{error, from_answer, malformed, while_connecting};
use crate::clock::jitter;
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{LostToken, Push, PushSender};
use crate::token::{SessionId, TokenId};

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A message to itself that takes longer is taken for lost: a pooler stands between.
const ECHO_WITHIN: Duration = Duration::from_millis(500);

fn channel(session: SessionId) -> String {
    format!("stanchion_{}", session.to_hex())
}

/// Starts listening. The receiver ends when that has succeeded or failed once. `is_deaf` tells whether pushes come; until
/// they are heard they do not.
pub(super) fn start(
    pool: &Arc<Pool>,
    session: SessionId,
    pushes: PushSender,
    is_deaf: Arc<AtomicBool>,
) -> Result<(AbortHandle, oneshot::Receiver<()>)> {
    let (tried, first_attempt) = oneshot::channel();
    let runtime = pool.runtime()?;
    is_deaf.store(true, Ordering::Relaxed);
    let task = runtime.spawn(listen(Arc::downgrade(pool), session, pushes, is_deaf, tried));
    Ok((task.abort_handle(), first_attempt))
}

async fn listen(
    pool: Weak<Pool>,
    session: SessionId,
    pushes: PushSender,
    is_deaf: Arc<AtomicBool>,
    tried: oneshot::Sender<()>,
) {
    let mut tried = Some(tried);
    let mut pause = FIRST_PAUSE;
    let (mut is_first, mut was_told) = (true, false);
    let mut warn = |message: String| {
        if !std::mem::replace(&mut was_told, true) {
            pushes.send(Push::Warning(message));
        }
    };
    loop {
        let Some(strong) = pool.upgrade() else { return };
        let mut watch = strong.watch();
        match subscribe(&strong.config, session).await {
            Ok((_client, server, mut messages)) => {
                let hears = hears_itself(&strong, session, &mut messages, &pushes).await;
                drop(strong);
                is_deaf.store(!hears, Ordering::Relaxed);
                if !hears {
                    let message = "notifications do not arrive (a transaction pooler?): waiting calls ask twenty times a \
                                   second; give a URL of the server itself with the option `listen`";
                    warn(message.to_owned());
                }
                drop(tried.take());
                if !is_first {
                    // Messages were missed, and what the server knows now may be less than what it knew.
                    pushes.send(Push::VerifyAll);
                }
                is_first = false;
                pause = FIRST_PAUSE;
                let hear = async {
                    while let Some(message) = messages.recv().await {
                        is_deaf.store(false, Ordering::Relaxed);
                        // What cannot be read is somebody else's.
                        if let Ok(push) = read(&message) {
                            pushes.send(push);
                        }
                    }
                };
                // A server that was left may keep its connections, and nothing is sent there any more.
                tokio::select! {
                    () = hear => {}
                    () = watch.left(&server) => {}
                }
            }
            Err(fault) => {
                drop(strong);
                drop(tried.take());
                warn(format!("no pushes, waiting calls ask twenty times a second: {}", fault.message()));
                is_first = false;
            }
        }
        is_deaf.store(true, Ordering::Relaxed);
        sleep(jitter(pause)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// A connection that listens, and what tells its server from others. It lives as long as the client does.
async fn subscribe(config: &Config, session: SessionId) -> Result<(Client, String, mpsc::UnboundedReceiver<String>)> {
    let Place { settings, tls } = config.listen.clone().ok_or_else(malformed)?;
    let subscribed = async {
        let (client, messages) = match tls {
            Tls::None => drive(settings.connect(NoTls).await.map_err(while_connecting)?),
            Tls::Verified(tls) => drive(settings.connect(tls).await.map_err(while_connecting)?),
        };
        let told = client.query_typed(&format!("SELECT {SERVER}"), &[]).await.map_err(from_answer)?;
        let told = told.first().ok_or_else(malformed)?;
        let read = |fault| malformed().with_source(fault);
        if told.try_get(0).map_err(read)? {
            return Err(error(ErrorKind::Unavailable, "the server takes no writes: it is a standby now, perhaps"));
        }
        let server = told.try_get(1).map_err(read)?;
        client.batch_execute(&format!("LISTEN {}", channel(session))).await.map_err(from_answer)?;
        Ok((client, server, messages))
    };
    let late = || Err(error(ErrorKind::Unavailable, format!("cannot connect: no answer within {CONNECT_WITHIN:?}")));
    within(CONNECT_WITHIN, subscribed).await.unwrap_or_else(late)
}

/// Runs the connection, and passes on what it hears.
fn drive<T>((client, mut connection): (Client, Connection<Socket, T>)) -> (Client, mpsc::UnboundedReceiver<String>)
where
    Connection<Socket, T>: Future<Output = Result<(), tokio_postgres::Error>> + Send + Unpin + 'static,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let (sender, messages) = mpsc::unbounded_channel();
    tokio::spawn(poll_fn(move |context| {
        loop {
            match std::task::ready!(connection.poll_message(context)) {
                Some(Ok(AsyncMessage::Notification(message))) => {
                    let _nobody_listens = sender.send(message.payload().to_owned());
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(()),
            }
        }
    }));
    (client, messages)
}

/// Whether a message that is sent as steps send them arrives.
async fn hears_itself(
    pool: &Arc<Pool>,
    session: SessionId,
    messages: &mut mpsc::UnboundedReceiver<String>,
    pushes: &PushSender,
) -> bool {
    if pool.ask("SELECT pg_catalog.pg_notify($1, 'echo')", &[(&channel(session), Type::TEXT)]).await.is_err() {
        // That is no proof of anything.
        return true;
    }
    let echo = async {
        while let Some(message) = messages.recv().await {
            match read(&message) {
                Ok(push) => pushes.send(push),
                Err(_) if message == "echo" => return true,
                Err(_) => {}
            }
        }
        false
    };
    within(ECHO_WITHIN, echo).await.unwrap_or(false)
}

/// `G` token fence key, or `F` token and what was lost.
fn read(text: &str) -> Result<Push> {
    let token = text.get(1..33).and_then(TokenId::from_hex).ok_or_else(malformed)?;
    let rest = &text[33..];
    match text.as_bytes().first() {
        Some(b'G') => {
            let (fence, key) = rest.split_once(' ').ok_or_else(malformed)?;
            let fence = Fence::new(fence.parse().map_err(|_| malformed())?);
            Ok(Push::Granted { key: Key::from_encoded(key)?, token, fence })
        }
        Some(b'F') => {
            let (length, rest) = rest.split_once(':').ok_or_else(malformed)?;
            let length: usize = length.parse().map_err(|_| malformed())?;
            let key = Key::from_encoded(rest.get(..length).ok_or_else(malformed)?)?;
            Ok(Push::ForceReleased(LostToken { key, token, reason: rest.get(length..).unwrap_or_default().to_owned() }))
        }
        _ => Err(malformed()),
    }
}
