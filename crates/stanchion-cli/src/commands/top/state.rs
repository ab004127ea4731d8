//! The state of the view: the keys of the last look, the selected hold, and a dialog.

use std::cmp::Reverse;
use std::time::Duration;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use stanchion::store::{HolderState, KeyState};
use stanchion::{BootTime, Fence, MAX_METADATA_BYTES, is_printable};

use super::looker::{Message, Order};

/// Number of rows that a page key moves by.
const PAGE: usize = 10;

#[derive(Debug)]
pub(super) struct State {
    pub(super) store: String,
    /// The keys with the most waiters first, then the oldest.
    keys: Vec<KeyState>,
    pub(super) damaged: usize,
    /// The time of the last look that was answered.
    pub(super) looked_at: Option<BootTime>,
    /// The time from which on the store was away, and the reason.
    pub(super) away: Option<(BootTime, String)>,
    selected: Option<RowId>,
    pub(super) dialog: Option<Dialog>,
    /// The result of the last order.
    pub(super) notice: Option<String>,
}

/// A row of the view: a holder of a key, or a key without holders.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row<'a> {
    pub(super) key: &'a KeyState,
    pub(super) holder: Option<&'a HolderState>,
}

/// The identity of a row, by which it is found again after a look.
#[derive(Clone, Debug, PartialEq, Eq)]
struct RowId {
    key: String,
    fence: Option<Fence>,
}

impl Row<'_> {
    fn id(&self) -> RowId {
        RowId { key: self.key.key.as_encoded().to_owned(), fence: self.fence() }
    }

    fn has(&self, id: &RowId) -> bool {
        self.fence() == id.fence && self.key.key.as_encoded() == id.key
    }

    fn fence(&self) -> Option<Fence> {
        self.holder.map(|holder| holder.fence)
    }
}

/// The questions before a hold is ended by force.
#[derive(Debug)]
pub(super) struct Dialog {
    pub(super) key: String,
    pub(super) owner: String,
    pub(super) fence: Fence,
    pub(super) reason: String,
    /// Whether the reason is complete, and the last question is open.
    pub(super) is_confirming: bool,
}

/// A wish of the user that the state cannot fulfil.
#[derive(Debug)]
pub(super) enum Action {
    Quit,
    Suspend,
    ForceRelease(Order),
}

impl State {
    pub(super) fn new(store: String) -> Self {
        Self {
            store,
            keys: Vec::new(),
            damaged: 0,
            looked_at: None,
            away: None,
            selected: None,
            dialog: None,
            notice: None,
        }
    }

    pub(super) fn rows(&self) -> Vec<Row<'_>> {
        self.keys.iter().flat_map(rows_of).collect()
    }

    pub(super) fn keys(&self) -> &[KeyState] {
        &self.keys
    }

    /// Returns the index of the selected row.
    pub(super) fn selected(&self) -> Option<usize> {
        let selected = self.selected.as_ref()?;
        self.rows().iter().position(|row| row.has(selected))
    }

    /// Takes a message of the looker.
    pub(super) fn learn(&mut self, message: Message, now: BootTime) {
        match message {
            Message::Looked(listing) => {
                (self.looked_at, self.away, self.damaged) = (Some(now), None, listing.damaged.len());
                let index = self.selected();
                self.keys = listing.keys;
                self.keys.sort_by_cached_key(|key| {
                    (Reverse(key.waiters.len()), Reverse(age(key)), key.key.as_encoded().to_owned())
                });
                self.select_again(index);
            }
            Message::Away(reason) => {
                let since = self.away.take().map_or(now, |(since, _)| since);
                self.away = Some((since, reason));
            }
            Message::Ordered(text) => self.notice = Some(text),
        }
    }

    /// Selects the row that was selected before a look: the same hold, else a row of the same key, else the row in the same
    /// place.
    fn select_again(&mut self, index: Option<usize>) {
        let before = self.selected.take();
        let rows = self.rows();
        let same = before.as_ref().and_then(|before| {
            let same_key = || rows.iter().position(|row| row.key.key.as_encoded() == before.key);
            rows.iter().position(|row| row.has(before)).or_else(same_key)
        });
        let place = index.unwrap_or_default().min(rows.len().saturating_sub(1));
        self.selected = rows.get(same.unwrap_or(place)).map(Row::id);
    }

    /// Takes a key.
    pub(super) fn press(&mut self, key: KeyEvent) -> Option<Action> {
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return Some(Action::Quit),
            KeyCode::Char('z') if control => return Some(Action::Suspend),
            KeyCode::Char(_) if control => return None,
            _ => {}
        }
        if let Some(dialog) = self.dialog.take() {
            return self.answer(dialog, key.code);
        }
        self.notice = None;
        match key.code {
            KeyCode::Char('q') => return Some(Action::Quit),
            KeyCode::Char('f') => self.ask(),
            KeyCode::Up | KeyCode::Char('k') => self.select(|index, _| index.saturating_sub(1)),
            KeyCode::Down | KeyCode::Char('j') => self.select(|index, _| index + 1),
            KeyCode::PageUp => self.select(|index, _| index.saturating_sub(PAGE)),
            KeyCode::PageDown => self.select(|index, _| index + PAGE),
            KeyCode::Home => self.select(|_, _| 0),
            KeyCode::End => self.select(|_, last| last),
            _ => {}
        }
        None
    }

    fn select(&mut self, place: impl Fn(usize, usize) -> usize) {
        let rows = self.rows();
        let last = rows.len().saturating_sub(1);
        let index = place(self.selected().unwrap_or_default(), last).min(last);
        self.selected = rows.get(index).map(Row::id);
    }

    /// Asks whether the selected hold is to be ended, and why.
    fn ask(&mut self) {
        let selected = self.selected().and_then(|index| self.rows().get(index).copied());
        self.dialog = selected.and_then(|row| {
            let holder = row.holder?;
            Some(Dialog {
                key: row.key.key.name().to_owned(),
                owner: holder.owner.clone(),
                fence: holder.fence,
                reason: String::new(),
                is_confirming: false,
            })
        });
        if self.dialog.is_none() {
            self.notice = Some("nobody holds this key: there is nothing to force-release".to_owned());
        }
    }

    /// Goes on with the dialog, or ends it.
    fn answer(&mut self, mut dialog: Dialog, key: KeyCode) -> Option<Action> {
        match key {
            KeyCode::Esc => self.notice = Some("nothing was changed".to_owned()),
            KeyCode::Char('y' | 'Y') if dialog.is_confirming => {
                let Dialog { key, fence, reason, .. } = dialog;
                return Some(Action::ForceRelease(Order { key, fence, reason }));
            }
            _ if dialog.is_confirming => self.notice = Some("nothing was changed".to_owned()),
            KeyCode::Enter => {
                // Without a reason the first question stays.
                dialog.is_confirming = !dialog.reason.trim().is_empty();
                self.dialog = Some(dialog);
            }
            KeyCode::Backspace => {
                dialog.reason.pop();
                self.dialog = Some(dialog);
            }
            KeyCode::Char(c) => {
                if is_printable(c) && dialog.reason.len() + c.len_utf8() <= MAX_METADATA_BYTES {
                    dialog.reason.push(c);
                }
                self.dialog = Some(dialog);
            }
            _ => self.dialog = Some(dialog),
        }
        None
    }
}

fn rows_of(key: &KeyState) -> impl Iterator<Item = Row<'_>> {
    let without = key.holders.is_empty().then_some(Row { key, holder: None });
    key.holders.iter().map(move |holder| Row { key, holder: Some(holder) }).chain(without)
}

/// Returns the age of the oldest hold or waiter of a key.
fn age(key: &KeyState) -> Duration {
    let holders = key.holders.iter().map(|holder| holder.age);
    holders.chain(key.waiters.iter().map(|waiter| waiter.age)).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use stanchion::Key;
    use stanchion::store::{Listing, WaiterState};

    use super::*;

    fn key(name: &str, age: u64, fences: &[u64], waiters: usize) -> KeyState {
        let holder = |fence: &u64| HolderState {
            fence: Fence::new(*fence),
            owner: format!("owner {fence}"),
            units: 1,
            capacity: 2,
            session_bound: true,
            age: Duration::from_secs(age),
            since: SystemTime::UNIX_EPOCH,
            remaining: None,
            metadata: None,
            trace: None,
            lingers: false,
        };
        let waiter = WaiterState {
            owner: "waiter".into(),
            units: 1,
            capacity: 2,
            age: Duration::ZERO,
            metadata: None,
            trace: None,
        };
        KeyState {
            key: Key::new("", name).unwrap(),
            holders: fences.iter().map(holder).collect(),
            waiters: vec![waiter; waiters],
            last_fence: None,
            closed_for: None,
        }
    }

    fn look(state: &mut State, keys: Vec<KeyState>) {
        state.learn(Message::Looked(Listing { keys, ..Listing::default() }), BootTime::from_nanos(0));
    }

    fn press(state: &mut State, keys: &[KeyCode]) -> Option<Action> {
        keys.iter().fold(None, |_, key| state.press(KeyEvent::new(*key, KeyModifiers::NONE)))
    }

    fn selected(state: &State) -> (String, Option<u64>) {
        let row = state.rows()[state.selected().unwrap()];
        (row.key.key.name().to_owned(), row.fence().map(Fence::get))
    }

    #[test]
    fn selection_follows_its_hold() {
        let mut state = State::new(String::new());
        look(&mut state, vec![key("young", 1, &[1], 0), key("old", 9, &[2, 3], 0), key("queue", 0, &[4], 2)]);
        let names: Vec<_> = state.rows().iter().map(|row| row.key.key.name().to_owned()).collect();
        assert_eq!(names, ["queue", "old", "old", "young"]);
        assert_eq!(selected(&state), ("queue".into(), Some(4)), "the first row");
        press(&mut state, &[KeyCode::Down, KeyCode::Down]);
        assert_eq!(selected(&state), ("old".into(), Some(3)));
        look(&mut state, vec![key("old", 9, &[2, 3], 7), key("queue", 0, &[4], 2)]);
        assert_eq!(selected(&state), ("old".into(), Some(3)), "in another place");
        look(&mut state, vec![key("old", 9, &[2], 0), key("queue", 0, &[4], 2)]);
        assert_eq!(selected(&state), ("old".into(), Some(2)), "the hold has ended, the key is held by another");
        look(&mut state, vec![key("a", 5, &[8], 0)]);
        assert_eq!(selected(&state), ("a".into(), Some(8)), "the key has gone, the next place is the last");
        press(&mut state, &[KeyCode::End, KeyCode::PageDown, KeyCode::Home]);
        assert_eq!(state.selected(), Some(0));
        look(&mut state, Vec::new());
        assert!(press(&mut state, &[KeyCode::Down, KeyCode::Char('f')]).is_none() && state.dialog.is_none());
    }

    #[test]
    fn force_release_needs_reason_and_yes() {
        let mut state = State::new(String::new());
        look(&mut state, vec![key("k", 1, &[7], 0)]);
        let ask = [KeyCode::Char('f'), KeyCode::Char('y'), KeyCode::Char(' '), KeyCode::Enter];
        for no in [KeyCode::Char('n'), KeyCode::Enter, KeyCode::Esc, KeyCode::Down] {
            assert!(press(&mut state, &[&ask[..], &[no]].concat()).is_none() && state.dialog.is_none(), "{no:?}");
        }
        let blank = [KeyCode::Char('f'), KeyCode::Char(' '), KeyCode::Enter, KeyCode::Char('y')];
        assert!(press(&mut state, &blank).is_none(), "a blank is no reason");
        press(&mut state, &[KeyCode::Esc]);
        // The hold changes while the user types: the question and the order are about the hold that was selected.
        press(&mut state, &ask);
        look(&mut state, vec![key("k", 1, &[8], 0)]);
        match press(&mut state, &[KeyCode::Char('y')]) {
            Some(Action::ForceRelease(order)) => {
                assert_eq!((order.key.as_str(), order.fence.get(), order.reason.as_str()), ("k", 7, "y "));
            }
            other => panic!("{other:?}"),
        }
    }
}
