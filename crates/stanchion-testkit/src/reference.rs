//! Models the granting rule of a store for one key, without time, sessions and fences.
//!
//! The model does not use [`Demand::fits`], so that it also checks a store that does.

use std::collections::VecDeque;

use stanchion::store::Demand;

/// Holds and queue of one key. `T` identifies a request.
#[derive(Clone, Debug)]
pub struct Reference<T> {
    holds: Vec<(T, Demand)>,
    queue: VecDeque<(T, Demand)>,
}

impl<T> Default for Reference<T> {
    fn default() -> Self {
        Self { holds: Vec::new(), queue: VecDeque::new() }
    }
}

impl<T: Copy + PartialEq> Reference<T> {
    fn fits(&self, demand: Demand) -> bool {
        if self.holds.is_empty() {
            return true;
        }
        let takes_all = |demand: Demand| demand.units() == demand.capacity();
        if takes_all(demand) || self.holds.iter().any(|(_, held)| takes_all(*held)) {
            return false;
        }
        let used: u64 = self.holds.iter().map(|(_, held)| u64::from(held.units())).sum();
        // The units in use must stay within the capacity of every holder and of the request.
        let all = self.holds.iter().map(|(_, held)| *held).chain([demand]);
        all.into_iter().all(|each| used + u64::from(demand.units()) <= u64::from(each.capacity()))
    }

    fn grant_waiters(&mut self) {
        while let Some((call, demand)) = self.queue.front().copied() {
            if !self.fits(demand) {
                break;
            }
            self.queue.pop_front();
            self.holds.push((call, demand));
        }
    }

    /// Requests the key. Returns whether the request was granted. If it was not and `enqueue` is set, the request is
    /// queued.
    pub fn acquire(&mut self, call: T, demand: Demand, enqueue: bool) -> bool {
        let fits = self.queue.is_empty() && self.fits(demand);
        if fits {
            self.holds.push((call, demand));
        } else if enqueue {
            self.queue.push_back((call, demand));
        }
        fits
    }

    /// Ends the hold or the wait of a request. Returns whether it held the key.
    pub fn end(&mut self, call: T) -> bool {
        let was_held = self.holds.iter().any(|(held, _)| *held == call);
        self.end_all(&[call]);
        was_held
    }

    /// Ends several requests, then grants the waiters that fit.
    pub fn end_all(&mut self, calls: &[T]) {
        self.holds.retain(|(held, _)| !calls.contains(held));
        self.queue.retain(|(waiting, _)| !calls.contains(waiting));
        self.grant_waiters();
    }

    /// Returns the number of waiters before this request, if it is queued.
    pub fn ahead(&self, call: T) -> Option<usize> {
        self.queue.iter().position(|(waiting, _)| *waiting == call)
    }

    /// Returns the requests that hold the key, oldest grant first.
    pub fn held(&self) -> Vec<T> {
        self.holds.iter().map(|(call, _)| *call).collect()
    }

    /// Returns units and capacity of the holders, oldest grant first.
    pub fn holders(&self) -> Vec<(u32, u32)> {
        self.holds.iter().map(|(_, held)| (held.units(), held.capacity())).collect()
    }

    /// Returns units and capacity of the waiters, head first.
    pub fn waiters(&self) -> Vec<(u32, u32)> {
        self.queue.iter().map(|(_, demand)| (demand.units(), demand.capacity())).collect()
    }

    /// Returns the smallest capacity of the holders, if they share the key.
    pub fn in_use(&self) -> Option<u32> {
        let shared = self.holds.iter().filter(|(_, held)| held.units() < held.capacity());
        shared.map(|(_, held)| held.capacity()).min()
    }
}
