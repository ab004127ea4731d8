//! stanchion: one at a time, across tasks, processes and machines.
#![doc = ""]

mod clock;
mod error;
mod fence;
mod key;
pub mod store;
mod token;

pub use clock::{BootTime, Clock, Sleep, VirtualClock};
pub use error::{Error, ErrorKind, LossCause, Result};
pub use fence::Fence;
pub use key::{Key, MAX_KEY_BYTES, MAX_NAMESPACE_BYTES};
pub use store::Store;
pub use token::{SessionId, Token, TokenId};
