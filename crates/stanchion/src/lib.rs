//! stanchion: one at a time, across tasks, processes and machines.

mod belief;
mod clock;
mod error;
mod event;
mod fence;
mod guard;
mod keeper;
mod key;
mod locks;
mod request;
mod retry;
mod shared;
pub mod store;
mod token;
mod wait;

pub use belief::Drift;
pub use clock::{BootTime, Clock, Sleep, VirtualClock};
pub use error::{Error, ErrorKind, LossCause, Result};
pub use event::{Event, EventStream};
pub use fence::Fence;
pub use guard::{Guard, Released};
pub use key::{Key, MAX_KEY_BYTES, MAX_NAMESPACE_BYTES};
pub use locks::{Builder, DURATIONS, Locks, MAX_METADATA_BYTES, MAX_OWNER_BYTES};
pub use request::LockRequest;
pub use retry::RetryPolicy;
pub use store::{Demand, Store};
pub use token::{SessionId, Token, TokenId};

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
