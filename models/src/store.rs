//! The store: one atomic step for each request.

use crate::config::{Config, Demand, Term};
use crate::history::History;
use crate::message::{Msg, Outcome, Token};
use crate::mutant::Break;

/// The token of the hold that is detached when a run of `adopt` begins.
pub const DETACHED: Token = 200;

/// A session's record.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Session {
    /// Dead from this time on.
    pub expires: u8,
    /// Tokens that were forced out, until they are ended.
    pub forced: Vec<Token>,
}

/// A hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hold {
    /// Whose.
    pub token: Token,
    /// Its fence.
    pub fence: u16,
    /// Its session.
    pub session: u8,
    /// Its own deadline.
    pub expires: Option<u8>,
    /// Whether it ends with its session.
    pub is_bound: bool,
    /// How much it takes.
    pub demand: Demand,
}

/// A place in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Whose.
    pub token: Token,
    /// Its session.
    pub session: u8,
    /// What it asks for.
    pub term: Term,
    /// How much it takes.
    pub demand: Demand,
}

/// The store's records.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Store {
    /// By client.
    pub sessions: Vec<Session>,
    /// The key's holds.
    pub holds: Vec<Hold>,
    /// The key's queue, first come first.
    pub queue: Vec<Place>,
    /// The newest fence of the key's record.
    pub last: u16,
}

/// One step: the records, and what surrounds them.
#[derive(Debug)]
pub struct Step<'a> {
    /// The bounds.
    pub config: &'a Config,
    /// The rule that is broken.
    pub broken: Option<Break>,
    /// The records.
    pub store: &'a mut Store,
    /// What the properties remember.
    pub history: &'a mut History,
    /// The store's clock.
    pub now: u8,
    /// Answers and pushes.
    pub out: Vec<Msg>,
    /// Tokens whose call lives, for I8.
    pub live: Vec<Token>,
}

impl Step<'_> {
    fn broken(&self, rule: Break) -> bool {
        self.broken == Some(rule)
    }

    /// Whether the session lives.
    pub fn lives(&self, session: u8) -> bool {
        self.store.sessions.get(usize::from(session)).is_some_and(|session| self.now < session.expires)
    }

    /// The session-bound holds are told to their sessions again.
    fn tell_again(&mut self) {
        if !self.broken(Break::GrantNotToldAgain) {
            let held = self.store.holds.iter().filter(|hold| hold.is_bound);
            self.out.extend(held.map(|hold| Msg::PushGranted { token: hold.token, fence: hold.fence }));
        }
    }

    /// Whether a request fits beside the holds: all units together, and the smallest capacity of all.
    pub fn fits(&self, demand: Demand) -> bool {
        let used: u8 = self.store.holds.iter().map(|hold| hold.demand.units).sum();
        let mut held = self.store.holds.iter().map(|hold| hold.demand.capacity);
        let capacity = if self.broken(Break::OwnLimitCounts) {
            demand.capacity
        } else if self.broken(Break::OldestLimitCounts) {
            held.next().unwrap_or(demand.capacity)
        } else {
            let own = if self.broken(Break::HeldLimitCounts) { u8::MAX } else { demand.capacity };
            held.min().unwrap_or(demand.capacity).min(own)
        };
        used + demand.units <= capacity
    }

    /// The place in the queue that is to be granted now.
    fn next(&self) -> Option<usize> {
        let places = if self.broken(Break::QueueSearched) { self.store.queue.len() } else { 1 };
        self.store.queue.iter().take(places).position(|place| self.fits(place.demand))
    }

    fn grant(&mut self, place: &Place, ahead: usize) -> (u16, Option<u8>) {
        self.history.bad_order |= ahead > 0;
        let clock = u16::from(self.now) * self.config.fences_per_tick;
        let clock = if self.broken(Break::PlainCounter) { 0 } else { clock };
        let fence = (self.store.last + 1).max(clock);
        self.store.last = fence;
        let expires = place.term.has_deadline().then(|| self.now + self.config.fixed_ttl);
        let is_bound = place.term.is_bound();
        let (token, session, demand) = (place.token, place.session, place.demand);
        self.store.holds.push(Hold { token, fence, session, expires, is_bound, demand });
        self.history.granted(place.token, fence, self.live.contains(&place.token));
        (fence, expires)
    }

    /// What every step does first: the dead go, the head of the queue is granted while it fits.
    pub fn settle(&mut self) {
        let (now, blind) = (self.now, self.config.blind);
        let live: Vec<bool> = self.store.sessions.iter().map(|session| now < session.expires).collect();
        let lives = |session: u8| blind || live.get(usize::from(session)).copied().unwrap_or(false);
        let keep = self.broken(Break::NoTakeover);
        self.store.holds.retain(|hold| {
            hold.expires.is_none_or(|expires| now < expires) && (!hold.is_bound || keep || lives(hold.session))
        });
        self.store.queue.retain(|place| lives(place.session));
        while let Some(at) = self.next() {
            let head = self.store.queue[at].clone();
            if self.broken(Break::HeadNotPopped) {
                if self.store.holds.iter().any(|hold| hold.token == head.token) {
                    break;
                }
            } else {
                self.store.queue.remove(at);
            }
            let (fence, _) = self.grant(&head, at);
            self.out.push(Msg::PushGranted { token: head.token, fence });
        }
    }

    /// Does one request.
    pub fn take(&mut self, msg: &Msg) {
        match *msg {
            Msg::Beat { by, asked } => return self.beat(by, asked),
            Msg::Write { fence } => return self.write(fence),
            Msg::Open { by, asked } => return self.open(by, asked),
            _ => self.settle(),
        }
        match *msg {
            Msg::Acquire { token, by, term, not_after, asked } => {
                let outcome = self.acquire(token, by, term, Some(not_after));
                self.out.push(Msg::Acquired { token, outcome, asked });
            }
            Msg::Poll { token, by, term, asked } => {
                let outcome = if self.broken(Break::PollCreates) {
                    self.acquire(token, by, term, None)
                } else {
                    self.look(token).unwrap_or(Outcome::Gone)
                };
                self.out.push(Msg::Polled { token, outcome, asked });
                // A failover may have forgotten a release.
                if self.config.failover && self.store.queue.first().is_some_and(|head| head.token == token) {
                    self.tell_again();
                }
            }
            Msg::End { token, release, sure } => {
                self.end(token, release);
                self.out.push(Msg::Ended { token, time: self.now, sure });
            }
            Msg::Extend { token, by, fence, nth, asked } => {
                let done = self.extend(token, by, fence, nth);
                self.out.push(Msg::Extended { token, done, nth, asked });
            }
            Msg::Ask => self.tell_again(),
            Msg::Force { fence } => self.force(fence),
            Msg::Evict { fence } => self.evict(fence),
            Msg::Adopt { from, to, by, not_after, asked } => {
                let outcome = self.adopt(from, to, by, not_after);
                self.out.push(Msg::Acquired { token: to, outcome, asked });
            }
            Msg::Record { session, token } if self.lives(session) => {
                self.store.sessions[usize::from(session)].forced.push(token);
            }
            Msg::Close { by } => {
                self.store.sessions[usize::from(by)].expires = 0;
                self.history.died(by);
            }
            _ => {}
        }
        self.settle();
    }

    fn beat(&mut self, by: u8, asked: u8) {
        let revive = self.broken(Break::Revive) || self.broken(Break::ReviveAndBelieve);
        let lives = self.lives(by) || revive;
        let session = &mut self.store.sessions[usize::from(by)];
        if lives {
            session.expires = self.now + self.config.session_ttl;
        }
        let forced = if self.broken == Some(Break::ForceNotTold) { Vec::new() } else { session.forced.clone() };
        self.out.push(Msg::Beaten { by, asked, lives, forced });
    }

    /// Asked for again it is the same session, and is not renewed.
    fn open(&mut self, by: u8, asked: u8) {
        let lives = self.lives(by) || self.broken(Break::OpenRevives);
        if !self.lives(by) && lives {
            self.store.sessions[usize::from(by)].expires = self.now + self.config.session_ttl;
        }
        self.out.push(Msg::Opened { by, asked, lives });
    }

    fn write(&mut self, fence: u16) {
        if fence >= self.history.accepted || self.broken(Break::ResourceUnfenced) {
            self.history.write(fence);
        }
    }

    /// What the token has.
    fn look(&self, token: Token) -> Option<Outcome> {
        if let Some(hold) = self.store.holds.iter().find(|hold| hold.token == token) {
            let remaining = hold.expires.map(|expires| expires - self.now);
            return Some(Outcome::Granted { fence: hold.fence, remaining });
        }
        self.store.queue.iter().any(|place| place.token == token).then_some(Outcome::Queued)
    }

    fn acquire(&mut self, token: Token, by: u8, term: Term, not_after: Option<u8>) -> Outcome {
        if !self.config.blind && !self.lives(by) {
            return Outcome::SessionGone;
        }
        if !self.broken(Break::ForcedReenters) && self.store.sessions[usize::from(by)].forced.contains(&token) {
            return Outcome::Forced;
        }
        if let (Some(found), false) = (self.look(token), self.broken(Break::NotIdempotent)) {
            return found;
        }
        if not_after.is_some_and(|until| self.now > until) && !self.broken(Break::NoNotAfter) {
            return Outcome::Stale;
        }
        let place = Place { token, session: by, term, demand: self.config.demand(by) };
        let ahead = self.store.queue.len();
        if (ahead == 0 || self.broken(Break::QueuePassed)) && self.fits(place.demand) {
            let (fence, expires) = self.grant(&place, ahead);
            return Outcome::Granted { fence, remaining: expires.map(|expires| expires - self.now) };
        }
        self.store.queue.push(place);
        Outcome::Queued
    }

    fn end(&mut self, token: Token, release: bool) {
        if release && self.broken(Break::ReleaseWithoutToken) {
            self.store.holds.clear();
        } else if release || !self.broken(Break::AbandonQueueOnly) {
            self.store.holds.retain(|hold| hold.token != token);
        }
        self.store.queue.retain(|place| place.token != token);
        for session in &mut self.store.sessions {
            session.forced.retain(|forced| *forced != token);
        }
    }

    fn extend(&mut self, token: Token, by: u8, fence: u16, nth: u8) -> bool {
        let expires = self.now + self.config.extension(nth);
        if let Some(hold) = self.store.holds.iter_mut().find(|hold| hold.token == token) {
            hold.expires = Some(expires);
            return true;
        }
        if self.broken(Break::ExtendCreates) {
            let demand = self.config.demand(by);
            self.store.holds.push(Hold { token, fence, session: by, expires: Some(expires), is_bound: false, demand });
            return true;
        }
        false
    }

    fn force(&mut self, fence: u16) {
        let any = self.broken(Break::ForceWithoutCompare);
        let Some(at) = self.store.holds.iter().position(|hold| any || hold.fence == fence) else { return };
        let hold = self.store.holds.remove(at);
        self.store.last += 1;
        self.history.forced(fence);
        if self.broken(Break::ForceInTwoSteps) {
            self.out.push(Msg::Record { session: hold.session, token: hold.token });
        } else if self.lives(hold.session) {
            let forced = &mut self.store.sessions[usize::from(hold.session)].forced;
            forced.push(hold.token);
            forced.sort_unstable();
        }
        self.out.push(Msg::PushForced { token: hold.token });
    }

    fn evict(&mut self, fence: u16) {
        let any = self.broken(Break::TakeoverWithoutCompare);
        if let Some(at) = self.store.holds.iter().position(|hold| any || hold.fence == fence) {
            self.store.holds.remove(at);
        }
    }

    fn adopt(&mut self, from: Token, to: Token, by: u8, not_after: u8) -> Outcome {
        if !self.lives(by) {
            return Outcome::SessionGone;
        }
        if let Some(found) = self.look(to) {
            return found;
        }
        if self.now > not_after && !self.broken(Break::AdoptNoNotAfter) {
            return Outcome::Stale;
        }
        let any = self.broken(Break::AdoptWithoutCompare);
        let Some(hold) = self.store.holds.iter_mut().find(|hold| any || hold.token == from) else {
            return Outcome::Gone;
        };
        hold.token = to;
        hold.session = by;
        self.look(to).unwrap_or(Outcome::Gone)
    }
}
