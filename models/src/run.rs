//! One run: all states within the bounds.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model};

use crate::config::Config;
use crate::model::{Action, Protocol};
use crate::mutant::Mutant;

/// What a run saw.
#[derive(Clone, Debug)]
pub struct Report {
    /// The name of the run or mutant.
    pub name: &'static str,
    /// The name of the configuration.
    pub config: &'static str,
    /// Unique states.
    pub states: usize,
    /// How long it took.
    pub took: Duration,
    /// The longest path that the search followed.
    pub depth: usize,
    /// Whether every state within the bounds was visited.
    pub complete: bool,
    /// What happened of the things that must happen in some run.
    pub reached: Vec<&'static str>,
    /// Broken properties, each with the way to it.
    pub broken: Vec<(&'static str, Vec<Action>)>,
}

impl Report {
    /// The way to a broken property.
    pub fn way(&self, property: &str) -> Option<&[Action]> {
        self.broken.iter().find(|(name, _)| *name == property).map(|(_, way)| way.as_slice())
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
            self.took.as_secs_f64(),
            self.depth
        )?;
        if self.broken.is_empty() {
            return write!(f, " holds");
        }
        for (name, way) in &self.broken {
            write!(f, " {name}({})", way.len())?;
        }
        Ok(())
    }
}

// How long a run takes is measured; nothing in the model depends on it.
#[allow(clippy::disallowed_methods)]
fn search(name: &'static str, protocol: Protocol, threads: usize, until: HasDiscoveries) -> Report {
    let began = Instant::now();
    let config = protocol.config.name;
    let checker = protocol.checker().threads(threads).finish_when(until).spawn_bfs().join();
    let mut broken: Vec<_> = checker.discoveries().into_iter().map(|(name, way)| (name, way.into_actions())).collect();
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
        took: began.elapsed(),
        depth: checker.max_depth(),
        broken,
    }
}

/// Visits every state of a configuration; the protocol as it stands. Goes on to the end unless a property breaks.
pub fn run(config: Config) -> Report {
    let protocol = Protocol { config, broken: None };
    search(config.name, protocol, 2, HasDiscoveries::AnyFailures)
}

/// Searches a mutant until its property breaks, or to the end. One thread, breadth first: the way is a shortest one.
pub fn run_mutant(mutant: Mutant) -> Report {
    let protocol = Protocol { config: mutant.config, broken: Some(mutant.broken) };
    let until = match mutant.killed_by {
        Some(property) => HasDiscoveries::AnyOf(BTreeSet::from([property])),
        None => HasDiscoveries::All,
    };
    search(mutant.name, protocol, 1, until)
}
