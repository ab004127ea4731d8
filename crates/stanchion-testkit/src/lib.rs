//! Tests whether a store conforms to the contract of [`stanchion::Store`], and provides real servers and faults for
//! tests.
//!
//! One line makes a test of every case, named after the behaviour, on the concrete store and through `Arc<dyn Store>`:
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
//! If a case needs a capability that the store does not declare, the test passes and prints to the standard error:
//! `not applicable: push_names_key_token_and_fence needs push`. [`cases`] lists all cases with their needs.
//!
//! `BEHAVIOURS.md` maps the behaviours that other libraries test to the cases.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "this crate is test code: it may panic, wait on the real clock and print"
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

pub use environment::{Client, Environment, Fixture, block_on, list_all, read_pages, seed, until};

/// A case of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Case {
    /// Name of the module, which is the subject of the case.
    pub subject: &'static str,
    /// Name of the behaviour.
    pub name: &'static str,
    /// Capabilities that a store must declare for the case to apply.
    pub needs: &'static [Need],
}

/// A capability that only some stores have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Need {
    /// Waiters are granted in the order of their requests.
    Fair,
    /// The store pushes grants.
    Push,
    /// A session lives until its ttl has passed without a renewal.
    Beat,
    /// A session lives as long as its process.
    Process,
}

impl Need {
    fn name(self) -> &'static str {
        match self {
            Self::Fair => "fair",
            Self::Push => "push",
            Self::Beat => "liveness by renewals",
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

/// Returns every case, in the order of the table.
pub fn cases() -> &'static [Case] {
    CASES
}

/// Returns whether a case applies to this store. If not, prints the reason without being captured by the test harness.
#[doc(hidden)]
pub fn applies<S: Store>(name: &str, needs: &[Need], environment: &Environment<S>) -> bool {
    use std::io::Write;

    let can = environment.open().capabilities();
    match needs.iter().find(|need| !need.is_met(can)) {
        Some(missing) => {
            let line = format!("not applicable: {name} needs {} ({})\n", missing.name(), can.name);
            let _ = std::io::stderr().write_all(line.as_bytes()); // the standard error may be closed
            false
        }
        None => true,
    }
}

/// Makes a test of every case of the suite for a store.
///
/// The macro defines a module with the given name that has two modules, `direct` and `dynamic`, each with one test per
/// case. The tests in `direct` use the concrete store, and those in `dynamic` use `Arc<dyn Store>`. The second argument
/// is a [`Fixture`] or a function that returns an [`Environment`] with fresh data.
///
/// `conformance!(dynamic name, fixture)` makes only the tests through `Arc<dyn Store>`, and `conformance!(direct name,
/// fixture)` only those on the concrete store. The dynamic tests share their code between stores and so compile
/// quickly; use them for the second and third configuration of a store.
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

/// Defines every case for `Arc<dyn Store>`. They are compiled once, here, and not again for each store.
#[doc(hidden)]
pub mod erased {
    #![allow(missing_docs, reason = "the name of a case describes it")]

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

macro_rules! define_cases {
    ($($subject:ident :: $case:ident $([$($need:ident),+])?),* $(,)?) => {
        static CASES: &[Case] = &[$(Case { subject: stringify!($subject), name: stringify!($case), needs: &[$($(Need::$need),+)?] }),*];
    };
}
for_every_case!(define_cases);
