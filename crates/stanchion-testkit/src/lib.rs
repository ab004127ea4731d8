//! The conformance suite that decides what a stanchion store is.
//!
//! One line instantiates every case for a store, each as a test named after the behaviour, on the concrete store and
//! through `Arc<dyn Store>`:
//!
//! ```
//! use stanchion::VirtualClock;
//! use stanchion::store::Memory;
//! use stanchion_testkit::{Environment, conformance};
//!
//! fn memory() -> Environment<Memory> {
//!     let time = VirtualClock::new();
//!     let store = Memory::with_clock(time.clock());
//!     Environment::new(move || store.clone()).with_time(time)
//! }
//!
//! conformance!(memory_store, memory);
//! ```
//!
//! `BEHAVIOURS.md` says which behaviour of which library each case stands for.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "all of this is test code: it may panic, wait on the real clock and print"
)]

#[doc(hidden)]
pub mod cases;
mod environment;
pub mod history;

pub use environment::{Actor, Environment, block_on, seed, until};

/// Instantiates every case of the suite for a store: a module of this name with two modules in it, `direct` and
/// `dynamic`, each with one test per case.
///
/// The second argument is a function that makes an [`Environment`]: fresh data each time.
#[macro_export]
macro_rules! conformance {
    ($name:ident, $environment:path) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            mod direct {
                #[allow(unused_imports)]
                use super::*;
                $crate::for_every_case!($crate::instantiate, direct, $environment);
            }
            mod dynamic {
                #[allow(unused_imports)]
                use super::*;
                $crate::for_every_case!($crate::instantiate, dynamic, $environment);
            }
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! instantiate {
    (direct, $environment:path, $($group:ident :: $case:ident),* $(,)?) => {
        $(#[test] fn $case() {
            $crate::block_on($crate::cases::$group::$case(&$environment()));
        })*
    };
    (dynamic, $environment:path, $($group:ident :: $case:ident),* $(,)?) => {
        $(#[test] fn $case() {
            $crate::block_on($crate::cases::$group::$case(&$environment().erase()));
        })*
    };
}
