//! The conformance suite that decides what a stanchion store is.
//!
//! One line instantiates every case for a store, each as a test named after the behaviour, on the concrete store and
//! through `Arc<dyn Store>`:
//!
//! ```
//! use stanchion::VirtualClock;
//! use stanchion::store::Memory;
//! use stanchion_testkit::{Environment, Fixture, conformance};
//!
//! struct MemoryFixture;
//!
//! impl Fixture for MemoryFixture {
//!     type Store = Memory;
//!
//!     fn fresh(&self) -> Environment<Memory> {
//!         let time = VirtualClock::new();
//!         let store = Memory::with_clock(time.clock());
//!         Environment::new(move || store.clone()).with_time(time)
//!     }
//! }
//!
//! conformance!(memory, MemoryFixture);
//! ```
//!
//! A case that needs what the store does not declare says so on the standard error and passes: `not applicable:
//! push_names_key_token_and_fence needs push`. [`cases`] lists all of them with what they need.
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
pub mod proxy;
pub mod reference;
pub mod servers;

use stanchion::Store;
use stanchion::store::{Capabilities, Liveness};

pub use environment::{Actor, Environment, Fixture, block_on, list_all, read_pages, seed, until};

/// A case of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Case {
    /// What it is about.
    pub subject: &'static str,
    /// The behaviour.
    pub name: &'static str,
    /// What a store must declare for it.
    pub needs: &'static [Need],
}

/// Something that only some stores can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Need {
    /// Waiters are granted in the order in which they asked.
    Fair,
    /// Grants are pushed.
    Push,
    /// Sessions live by beats.
    Beat,
    /// Sessions live by their process.
    Process,
}

impl Need {
    fn name(self) -> &'static str {
        match self {
            Self::Fair => "fair",
            Self::Push => "push",
            Self::Beat => "liveness by beats",
            Self::Process => "liveness by process",
        }
    }

    fn is_met(self, by: Capabilities) -> bool {
        match self {
            Self::Fair => by.fair,
            Self::Push => by.push,
            Self::Beat => by.liveness == Liveness::Renewal,
            Self::Process => by.liveness == Liveness::Process,
        }
    }
}

/// Every case, in the order of the table.
pub fn cases() -> &'static [Case] {
    CASES
}

/// Whether a case applies to this store. If not, says so where a test's captured output does not hide it.
#[doc(hidden)]
pub fn applies<S: Store>(name: &str, needs: &[Need], environment: &Environment<S>) -> bool {
    use std::io::Write;

    let can = environment.open().capabilities();
    match needs.iter().find(|need| !need.is_met(can)) {
        Some(missing) => {
            let line = format!("not applicable: {name} needs {} ({})\n", missing.name(), can.name);
            let _nobody_reads_it = std::io::stderr().write_all(line.as_bytes());
            false
        }
        None => true,
    }
}

/// Instantiates every case of the suite for a store: a module of this name with two modules in it, `direct` and
/// `dynamic`, each with one test per case. `dynamic` runs the case through `Arc<dyn Store>`.
///
/// The second argument is a [`Fixture`], or a function that makes an [`Environment`]: fresh data each time.
///
/// `conformance!(dynamic name, fixture)` makes only the tests through `Arc<dyn Store>`. They cost little to compile, because
/// their code is the same for every store, so they suit a store's second and third configuration. `direct` makes the others.
#[macro_export]
macro_rules! conformance {
    ($name:ident, $fixture:expr) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            $crate::conformance!(direct direct, $fixture);
            $crate::conformance!(dynamic dynamic, $fixture);
        }
    };
    (direct $name:ident, $fixture:expr) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            $crate::for_every_case!($crate::instantiate, fresh, $fixture);
        }
    };
    (dynamic $name:ident, $fixture:expr) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            $crate::for_every_case!($crate::instantiate_erased, fresh_erased, $fixture);
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! instantiate {
    ($fresh:ident, $fixture:expr, $($subject:ident :: $case:ident $([$($need:ident),+])?),* $(,)?) => {
        $(#[test] fn $case() {
            let environment = $crate::Fixture::$fresh(&$fixture);
            if $crate::applies(stringify!($case), &[$($($crate::Need::$need),+)?], &environment) {
                $crate::block_on($crate::cases::$subject::$case(&environment));
            }
        })*
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! instantiate_erased {
    ($fresh:ident, $fixture:expr, $($subject:ident :: $case:ident $([$($need:ident),+])?),* $(,)?) => {
        $(#[test] fn $case() {
            $crate::erased::$case(&$crate::Fixture::$fresh(&$fixture));
        })*
    };
}

/// Every case through `Arc<dyn Store>`: compiled once, here, and not again for each store.
#[doc(hidden)]
pub mod erased {
    #![allow(missing_docs, reason = "a case's name says what it is")]

    use std::sync::Arc;

    use crate::{Environment, Need, Store};

    macro_rules! erased {
        ($($subject:ident :: $case:ident $([$($need:ident),+])?),* $(,)?) => {
            $(pub fn $case(environment: &Environment<Arc<dyn Store>>) {
                if crate::applies(stringify!($case), &[$($(Need::$need),+)?], environment) {
                    crate::block_on(crate::cases::$subject::$case(environment));
                }
            })*
        };
    }
    crate::for_every_case!(erased);
}

macro_rules! listed {
    ($($subject:ident :: $case:ident $([$($need:ident),+])?),* $(,)?) => {
        static CASES: &[Case] = &[$(Case { subject: stringify!($subject), name: stringify!($case), needs: &[$($(Need::$need),+)?] }),*];
    };
}
for_every_case!(listed);
