//! Distributed locks: one holder of a key at a time, across tasks, processes and machines.
//!
//! - **Fair.** Waiters are served first come, first served, and are notified when they get the key.
//! - **Fenced.** Every grant carries a [`Fence`], a number that only rises. A resource that rejects lower fences cannot
//!   be harmed by a holder that wakes up too late.
//! - **Honest about losses.** A holder learns from its own clock, without a network, that it has lost the key, before
//!   another process can get it: [`Guard::lost`].
//! - **Drop-safe.** A future or guard that is dropped anywhere leaves nothing behind. The keeper, a thread of the
//!   library, cleans up.
//! - **One API over several stores.** A URL selects the store.
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
//! # Stores
//!
//! | URL for [`Locks::open`] | Coordinates | Feature | After the holder's process is killed, the key is free |
//! |---|---|---|---|
//! | `memory:` ([`store::Memory`]) | tasks of one process; tests | always there | when its session expires |
//! | `sqlite:FOLDER`, `sqlite:` ([`store::Sqlite`]) | processes of one machine | `sqlite` | at once |
//! | `redis://HOST`, `rediss:`, `redis+unix:`, `redis+sentinel:`, `redis+cluster:` ([`store::Redis`]) | machines, through Redis or Valkey | `redis` | within [`session_ttl`](Builder::session_ttl), 10 s by default |
//! | `postgres://USER@HOST/DATABASE` ([`store::Postgres`]) | machines, through PostgreSQL 15 or later | `postgres` | within `session_ttl` |
//! | `firestore://PROJECT/DATABASE` ([`store::Firestore`]) | machines, through Firestore | `firestore` | within `session_ttl` |
//!
//! How to choose:
//!
//! - **One machine:** use `sqlite:`. It needs no server.
//! - **Several machines:** use a server that you already run.
//! - **The protected data is in PostgreSQL:** use `postgres:`. [`store::Postgres::check_fence`] makes the fence check
//!   and your write one transaction.
//! - **Losing a lock in a failover is worse than waiting:** do not use `redis:`. A Redis failover may forget
//!   acknowledged locks, and two holders may overlap until the older one is notified. Fences still rise.
//! - **Your own store:** implement [`Store`] and pass it to [`Locks::with_store`].
//!
//! You need no lock between the tasks of one process (use `tokio::sync::Mutex`), nor for exclusive *writes* to one
//! database (use its transactions).
//!
//! # Guarantees
//!
//! While clocks run at the same rate within the [`Drift`], and the store keeps acknowledged data:
//!
//! - The intervals in which two exclusive holders of a key believe that they hold it do not overlap.
//! - The fences of a key strictly increase over all its grants, also after a failover that forgets locks.
//! - Waiters are served first come, first served, readers and writers in one queue.
//! - A holder learns of a loss before another process can get the key.
//! - A dropped future or guard leaves nothing in the store a second later.
//! - An [`Error`] says whether the request happened, did not happen, or may have happened.
//!
//! Not guaranteed: exclusive *effects* without a fence check, because a paused process can write late; progress while
//! the store is down; and that [`Locks::is_locked`] is still true when you read it. `docs/guide/guarantees.md` has the
//! details.
//!
//! # Where to start
//!
//! - [`Locks`] is the handle: [`lock`](Locks::lock), [`try_lock`](Locks::try_lock), [`read`](Locks::read),
//!   [`semaphore`](Locks::semaphore), [`lock_all`](Locks::lock_all), [`once`](Locks::once), [`elect`](Locks::elect).
//! - [`LockRequest`] has the options of one call: wait limit, lifetime, cooldown.
//! - [`Guard`] is a lock that is held. Dropping it releases the lock.
//! - [`Error`] is the only error type; an [`Event`] reports background work, such as a loss or a retry.
//! - [`blocking`] is the same API without async. It is always there.
//! - For tests: [`store::Memory`] with a [`VirtualClock`], and [`store::Faulty`] to inject faults.
//!
//! # Words
//!
//! - A **key** names the thing that is locked. A **hold** is one granted lock of a key.
//! - A **session** is the proof that a process lives, one per handle. The keeper renews it; if it expires, its holds
//!   end.
//! - A **token** identifies a hold. A hold that was [detached](Guard::detach) can be [adopted](Locks::adopt) with it by
//!   another process.
//! - **Lost** means that a holder must stop because another may soon get the key. It is final.
//!
//! # Features
//!
//! - `sqlite`, `redis`, `postgres`, `firestore`: the stores of the table above.
//! - `tracing`, `metrics`: telemetry. `docs/reference/telemetry.md` lists the names.
//! - `tower`: a lock around each request of an HTTP service, [`tower::LockLayer`].
//! - `macros`: a lock around a function, [`locked`](macro@locked).
//!
//! Features only add: no feature changes the behaviour of another one.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod adopt;
pub mod blocking;
mod builder;
mod clock;
mod command;
mod detached;
mod error;
mod event;
mod fence;
mod guard;
mod handle;
mod in_flight;
mod keeper;
mod key;
mod lease;
mod lifecycle;
mod limits;
mod linger;
mod locks;
mod loss_executor;
mod observer;
mod on_lost;
mod options;
mod polls;
mod primitives;
mod printable;
mod request;
mod retry;
mod shared;
pub mod store;
mod store_clock;
mod sync;
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
pub use event::{Event, LingerEnd};
pub use fence::Fence;
pub use guard::{Guard, Released};
pub use handle::drain;
pub use key::{Key, MAX_KEY_BYTES, MAX_NAMESPACE_BYTES};
pub use lease::Drift;
pub use limits::{DURATION_RANGE, MAX_METADATA_BYTES, MAX_OWNER_BYTES};
pub use locks::Locks;
pub use observer::EventStream;
pub use on_lost::{Loss, OnLost};
pub use primitives::{
    Election, Guards, KeyRequest, Leader, LeaderStream, Leadership, LockAllRequest, OnceGuard, OnceOutcome,
    OnceRequest, OwnerStatus, RunListing, RunRecord,
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
///     /// Waits for the lock for at most 5 s. Nobody can index the file again within 5 min.
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

/// Compiles and runs the examples of the pages.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../../../README.md")]
    struct Readme;

    #[doc = include_str!("../../../docs/coming-from/alepha.md")]
    struct FromAlepha;

    #[doc = include_str!("../../../docs/coming-from/distributed-locker.md")]
    struct FromDistributedLocker;

    #[doc = include_str!("../../../docs/coming-from/etcd.md")]
    struct FromEtcd;

    #[doc = include_str!("../../../docs/coming-from/exclusive-lock.md")]
    struct FromExclusiveLock;

    #[doc = include_str!("../../../docs/coming-from/kube-leader-election.md")]
    struct FromKubeLeaderElection;

    #[doc = include_str!("../../../docs/coming-from/medallion.md")]
    struct FromMedallion;

    #[doc = include_str!("../../../docs/coming-from/redisson.md")]
    struct FromRedisson;

    #[doc = include_str!("../../../docs/coming-from/redlock-rs.md")]
    struct FromRedlockRs;

    #[doc = include_str!("../../../docs/coming-from/redsync.md")]
    struct FromRedsync;

    #[doc = include_str!("../../../docs/coming-from/rslock.md")]
    struct FromRslock;

    #[doc = include_str!("../../../docs/coming-from/shedlock.md")]
    struct FromShedlock;

    #[doc = include_str!("../../../docs/coming-from/sqlx.md")]
    struct FromSqlx;

    #[doc = include_str!("../../../docs/coming-from/sync.md")]
    struct FromSync;

    #[doc = include_str!("../../../docs/coming-from/syncguard.md")]
    struct FromSyncguard;

    #[doc = include_str!("../../../docs/guide/cron-and-leaders.md")]
    struct CronAndLeaders;

    #[doc = include_str!("../../../docs/guide/fencing.md")]
    struct Fencing;

    #[doc = include_str!("../../../docs/guide/hot-keys.md")]
    struct HotKeys;

    #[doc = include_str!("../../../docs/guide/long-jobs.md")]
    struct LongJobs;

    #[doc = include_str!("../../../docs/guide/testing.md")]
    struct Testing;
}
