//! Listens for the pushes of a session, with `LISTEN` over a connection of its own.

use std::future::{Future, poll_fn};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio_postgres::types::Type;
use tokio_postgres::{AsyncMessage, Client, Connection, NoTls, Socket};

use super::config::{CONNECT_TIMEOUT, Config, Endpoint, Tls};
use super::connect::{Pool, SERVER};
use super::error::{cannot_connect, error, from_answer, malformed, while_connecting};
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::backoff::{Backoff, within};
use crate::store::{LostToken, Push, PushSender};
use crate::token::{SessionId, TokenId};

/// Minimum and maximum pause between two attempts to listen.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Time after which a message that the listener sent to itself counts as lost. A transaction pooler loses messages.
const ECHO_TIMEOUT: Duration = Duration::from_millis(500);

fn channel(session: SessionId) -> String {
    format!("stanchion_{}", session.to_hex())
}

/// Starts to listen, in the runtime of the connections. The receiver ends when the first attempt has succeeded or
/// failed. `is_down` is true until pushes arrive, and again whenever they stop.
pub(super) fn start(
    pool: &Arc<Pool>,
    session: SessionId,
    pushes: PushSender,
    is_down: Arc<AtomicBool>,
) -> Result<(AbortHandle, oneshot::Receiver<()>)> {
    let (tried, first_attempt) = oneshot::channel();
    let runtime = pool.runtime()?;
    is_down.store(true, Ordering::Relaxed);
    let task = runtime.spawn(listen(Arc::downgrade(pool), session, pushes, is_down, tried));
    Ok((task.abort_handle(), first_attempt))
}

async fn listen(
    pool: Weak<Pool>,
    session: SessionId,
    pushes: PushSender,
    is_down: Arc<AtomicBool>,
    tried: oneshot::Sender<()>,
) {
    let mut tried = Some(tried);
    let mut pauses = Backoff::new(SHORTEST_PAUSE, LONGEST_PAUSE);
    let (mut is_first, mut has_warned) = (true, false);
    let mut warn = |message: String| {
        if !std::mem::replace(&mut has_warned, true) {
            pushes.send(Push::Warning(message));
        }
    };
    loop {
        let Some(strong) = pool.upgrade() else { return };
        let mut watch = strong.watch();
        match subscribe(&strong.config, session).await {
            Ok((_client, server, mut messages)) => {
                let arrive = receives_echo(&strong, session, &mut messages, &pushes).await;
                drop(strong);
                is_down.store(!arrive, Ordering::Relaxed);
                if !arrive {
                    let message = "notifications do not arrive (is there a transaction pooler?), falling back to polling \
                                   every 50 ms: name the server itself in the option `listen`";
                    warn(message.to_owned());
                }
                drop(tried.take());
                if !is_first {
                    // Messages were lost, and the server may have lost holds too.
                    pushes.send(Push::VerifyAll);
                }
                is_first = false;
                pauses.reset();
                let receive = async {
                    while let Some(message) = messages.recv().await {
                        is_down.store(false, Ordering::Relaxed);
                        // An unreadable message was sent by another program.
                        if let Ok(push) = read(&message) {
                            pushes.send(push);
                        }
                    }
                };
                // After a failover the old server may keep this connection open, but it sends nothing any more.
                tokio::select! {
                    () = receive => {}
                    () = watch.replaced(&server) => {}
                }
            }
            Err(fault) => {
                drop(strong);
                drop(tried.take());
                warn(format!("notifications unavailable, falling back to polling every 50 ms: {}", fault.message()));
                is_first = false;
            }
        }
        is_down.store(true, Ordering::Relaxed);
        pauses.pause().await;
    }
}

/// Opens a connection that listens, and returns the identity of its server too. The connection lives as long as the
/// client.
async fn subscribe(config: &Config, session: SessionId) -> Result<(Client, String, mpsc::UnboundedReceiver<String>)> {
    let Endpoint { settings, tls } = config.listen.clone().ok_or_else(malformed)?;
    let subscribed = async {
        let failed = |fault| while_connecting(&settings, fault);
        let (client, messages) = match tls {
            Tls::None => drive(settings.connect(NoTls).await.map_err(failed)?),
            Tls::Verified(tls) => drive(settings.connect(tls).await.map_err(failed)?),
        };
        let rows = client.query_typed(&format!("SELECT {SERVER}"), &[]).await.map_err(from_answer)?;
        let row = rows.first().ok_or_else(malformed)?;
        let unreadable = |fault| malformed().with_source(fault);
        if row.try_get(0).map_err(unreadable)? {
            return Err(error(ErrorKind::Unavailable, "the server accepts no writes: it may be a standby now"));
        }
        let server = row.try_get(1).map_err(unreadable)?;
        client.batch_execute(&format!("LISTEN {}", channel(session))).await.map_err(from_answer)?;
        Ok((client, server, messages))
    };
    let late =
        || Err(cannot_connect(&settings, ErrorKind::Unavailable, &format!("no answer within {CONNECT_TIMEOUT:?}")));
    within(CONNECT_TIMEOUT, subscribed).await.unwrap_or_else(late)
}

/// Drives a connection in a task, and returns the notifications that arrive over it.
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
                    let _ = sender.send(message.payload().to_owned()); // The listener may have ended.
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(()),
            }
        }
    }));
    (client, messages)
}

/// Returns whether a message arrives that is sent over a connection for operations, as real notifications are.
async fn receives_echo(
    pool: &Arc<Pool>,
    session: SessionId,
    messages: &mut mpsc::UnboundedReceiver<String>,
    pushes: &PushSender,
) -> bool {
    if pool.query("SELECT pg_catalog.pg_notify($1, 'echo')", &[(&channel(session), Type::TEXT)]).await.is_err() {
        // The message was not sent, which proves nothing about the listener.
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
    within(ECHO_TIMEOUT, echo).await.unwrap_or(false)
}

/// Reads a message. A grant is `G`, the token, the fence, a space and the key. A forced release is `F`, the token, the
/// length of the key, a colon, the key and the reason. A recall is `R` and the token.
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
        Some(b'R') if rest.is_empty() => Ok(Push::Recall { token }),
        _ => Err(malformed()),
    }
}
