//! Checks one run by visiting all states within its bounds.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model};

use crate::config::Config;
use crate::model::{Action, Protocol};
use crate::mutant::Mutant;

/// Result of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Name of the run or mutant.
    pub name: &'static str,
    /// Name of the bounds.
    pub config: &'static str,
    /// Number of unique states.
    pub states: usize,
    /// Wall time of the run.
    pub duration: Duration,
    /// Length of the longest path that the search followed.
    pub depth: usize,
    /// Whether every state within the bounds was visited.
    pub complete: bool,
    /// Events that this run reached.
    pub reached: Vec<&'static str>,
    /// Broken properties with the trace to each.
    pub broken: Vec<(&'static str, Vec<Action>)>,
}

impl Report {
    /// Returns the trace to a broken property.
    pub fn trace(&self, property: &str) -> Option<&[Action]> {
        self.broken.iter().find(|(name, _)| *name == property).map(|(_, trace)| trace.as_slice())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:26} {:22} {:9} states {:6.2} s depth {:3}",
            self.name,
            self.config,
            self.states,
            self.duration.as_secs_f64(),
            self.depth
        )?;
        if self.broken.is_empty() {
            return write!(f, " holds");
        }
        for (name, trace) in &self.broken {
            write!(f, " {name}({})", trace.len())?;
        }
        Ok(())
    }
}

// The clock measures only how long a run takes; nothing in the model depends on it.
#[allow(clippy::disallowed_methods)]
fn search(name: &'static str, protocol: Protocol, threads: usize, until: HasDiscoveries) -> Report {
    let began = Instant::now();
    let config = protocol.config.name;
    let checker = protocol.checker().threads(threads).finish_when(until).spawn_bfs().join();
    let mut broken: Vec<_> =
        checker.discoveries().into_iter().map(|(name, trace)| (name, trace.into_actions())).collect();
    broken.sort_unstable_by_key(|(name, _)| *name);
    let sometimes = |name: &str| name.contains(' ');
    let reached = broken.iter().map(|(name, _)| *name).filter(|name| sometimes(name)).collect();
    broken.retain(|(name, _)| !sometimes(name));
    let complete = checker.is_done() && broken.is_empty();
    Report {
        name,
        config,
        complete,
        reached,
        states: checker.unique_state_count(),
        duration: began.elapsed(),
        depth: checker.max_depth(),
        broken,
    }
}

/// Checks the unbroken protocol by visiting every state within these bounds, and stops early only if a property fails.
pub fn run(config: Config) -> Report {
    let protocol = Protocol { config, broken: None };
    search(config.name, protocol, 2, HasDiscoveries::AnyFailures)
}

/// Checks a mutant until its property fails. A breadth-first search with one thread finds a shortest trace.
pub fn run_mutant(mutant: Mutant) -> Report {
    let protocol = Protocol { config: mutant.config, broken: Some(mutant.broken) };
    let until = match mutant.killed_by {
        Some(property) => HasDiscoveries::AnyOf(BTreeSet::from([property])),
        None => HasDiscoveries::All,
    };
    search(mutant.name, protocol, 1, until)
}
