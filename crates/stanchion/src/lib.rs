//! Distributed locks: one at a time, across tasks, processes and machines.
//!
//! - Waiters are served first come first served, and are called when it is their turn.
//! - Every grant carries a [`Fence`]: a number that what the lock protects can compare, so that a holder that woke up too
//!   late does no harm. It is the product; the lock is the convenience.
//! - A holder is told that it has lost, on time and without any network: [`Guard::lost`].
//! - Dropping a future or a guard anywhere leaves nothing behind: a thread of its own, the keeper, cleans up.
//! - One interface over several stores; a URL chooses.
//!
//! ```
//! use stanchion::Locks;
//!
//! # async fn charge(_fence: stanchion::Fence) {}
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let locks = Locks::open("memory:").await?; // or sqlite:FOLDER
//! let guard = locks.lock("invoice:42").await?;
//! charge(guard.fence()).await;
//! # Ok::<(), stanchion::Error>(()) }).unwrap();
//! ```
//!
//! # Where to start
//! [`Locks`] opens a store; [`LockRequest`] is what [`Locks::lock`] makes, with its limits; [`Guard`] is what it gives.
//! [`Error`] is the one error. [`store`] is for those who write a store, and for tests: [`store::Memory`] with a
//! [`VirtualClock`], [`store::Faulty`] for lost answers and worse.
//!
//! # Use something else
//! Between the tasks of one process `tokio::sync::Mutex` is enough. For exclusive *writes* to one database, its own
//! transactions are better than any lock.
//!
//! # Features
//! `sqlite` (default): the embedded store; `redis`, `postgres`, `firestore`: those. The memory store is always there.
//! `tracing`, `metrics`: telemetry, by the names in `docs/telemetry.md`. `tower`: a lock around each request of an HTTP service,
//! [`tower::LockLayer`]. `macros`: a lock around a function, [`locked`](macro@locked). The surface without async, [`blocking`], is
//! always there. A feature only adds.

pub mod blocking;
mod builder;
mod clock;
mod command;
mod error;
mod event;
mod fence;
mod guard;
mod keeper;
mod key;
mod lease;
mod locks;
mod loss_executor;
mod on_lost;
mod polls;
mod primitives;
mod printable;
mod request;
mod retry;
mod shared;
pub mod store;
mod store_clock;
mod telemetry;
mod thread;
mod token;
mod tokens;
#[cfg(feature = "tower")]
pub mod tower;
mod wait;
mod waiter;

pub use builder::Builder;
pub use clock::{BootTime, Clock, Sleep, VirtualClock};
pub use error::{Error, ErrorKind, LossCause, Result};
pub use event::{Event, EventStream};
pub use fence::Fence;
pub use guard::{Guard, Released};
pub use key::{Key, MAX_KEY_BYTES, MAX_NAMESPACE_BYTES};
pub use lease::Drift;
pub use locks::{DURATION_RANGE, Locks, MAX_METADATA_BYTES, MAX_OWNER_BYTES, drain};
pub use on_lost::{Loss, OnLost};
pub use primitives::{
    Election, Guards, KeyRequest, Leader, LeaderStream, Leadership, LockAllRequest, OnceGuard, OnceOutcome,
    OnceRequest, OwnerStatus, RunRecord,
};
#[doc(hidden)]
pub use printable::is_printable;
pub use request::LockRequest;
pub use retry::RetryPolicy;
pub use store::{Demand, Store};
pub use telemetry::KeyRedaction;
pub use token::{SessionId, Token, TokenId};

/// ```
/// use stanchion::{Locks, Result};
///
/// struct Files {
///     locks: Locks,
/// }
///
/// impl Files {
///     /// Waits for five seconds at most; the file stays closed for five minutes afterwards.
///     #[stanchion::locked(key = "file:{id}", wait = "5s", cooldown = "5m", guard = guard)]
///     async fn index(&self, id: u64) -> Result<String> {
///         Ok(format!("file {id} under fence {}", guard.fence()))
///     }
/// }
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let files = Files { locks: Locks::open("memory:").await? };
/// files.index(7).await?;
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[cfg(feature = "macros")]
pub use stanchion_macros::locked;

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

#[cfg(doctest)]
#[doc = include_str!("../../../docs/coming-from.md")]
struct ComingFrom;
