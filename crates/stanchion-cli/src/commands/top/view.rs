//! Draws the state.

use ratatui::Frame;
use ratatui::layout::{Constraint, Flex, Layout, Rect};
use ratatui::style::{Style, Stylize as _};
use ratatui::text::Line;
use ratatui::widgets::{Block, Borders, Clear, Padding, Paragraph, Row as TableRow, Table, TableState, Wrap};
use stanchion::BootTime;

use super::state::{Dialog, Row, State};
use crate::output::{cell, escape, for_people, limit};

/// Height of the part about the selected key, with its title.
const DETAILS: u16 = 9;

/// Height of a terminal below which there is no part about the selected key.
const HEIGHT_FOR_DETAILS: u16 = 18;

pub(super) fn draw(frame: &mut Frame<'_>, state: &State, now: BootTime) {
    let rows = state.rows();
    let selected = state.selected();
    let details = if frame.area().height < HEIGHT_FOR_DETAILS { 0 } else { DETAILS };
    let areas = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Min(2),
        Constraint::Length(details),
        Constraint::Length(1),
    ]);
    let [head, status, list, details, foot] = areas.areas(frame.area());
    frame.render_widget(header(state, now), head);
    frame.render_widget(status_line(state, now), status);
    draw_rows(frame, &rows, selected, list);
    if let Some(row) = selected.and_then(|index| rows.get(index)) {
        frame.render_widget(about(row, details), details);
    }
    let keys = " up/down select   f force-release   q quit   (looks once a second, sees no hold in between)";
    frame.render_widget(Line::raw(keys).dim(), foot);
    if let Some(dialog) = &state.dialog {
        draw_dialog(frame, dialog);
    }
}

fn header(state: &State, now: BootTime) -> Line<'static> {
    let keys = state.keys();
    let holds: usize = keys.iter().map(|key| key.holders.len()).sum();
    let waiters: usize = keys.iter().map(|key| key.waiters.len()).sum();
    let when = match state.looked_at {
        // Whole seconds, so that a line is not drawn again and again.
        Some(at) => format!("{}s ago", now.since(at).as_secs()),
        None => "not looked yet".to_owned(),
    };
    Line::raw(format!(" {}   keys {}   holds {holds}   waiters {waiters}   {when}", state.store, keys.len())).bold()
}

/// The most important of: an outage, the result of an order, damaged entries.
fn status_line(state: &State, now: BootTime) -> Line<'static> {
    if let Some((since, reason)) = &state.away {
        let span = now.since(*since).as_secs();
        return Line::raw(format!(" the store is away, for {span}s: {reason}")).reversed();
    }
    match (&state.notice, state.damaged) {
        (Some(notice), _) => Line::raw(format!(" {notice}")).bold(),
        (None, 0) => Line::default(),
        (None, damaged) => Line::raw(format!(" {damaged} entries of the store are damaged: `ls` names them")).bold(),
    }
}

fn draw_rows(frame: &mut Frame<'_>, rows: &[Row<'_>], selected: Option<usize>, area: Rect) {
    let widths = [
        Constraint::Fill(3),
        Constraint::Length(7),
        Constraint::Length(10),
        Constraint::Length(7),
        Constraint::Length(12),
        Constraint::Fill(3),
        Constraint::Length(16),
    ];
    // A page of rows: there may be very many keys.
    let height = usize::from(area.height).saturating_sub(1).max(1);
    let first = selected.unwrap_or_default() / height * height;
    let page = rows.iter().skip(first).take(height).map(table_row);
    let selected = selected.map(|index| index - first);
    let head = TableRow::new(["KEY", "STATE", "FOR", "WAITING", "LONGEST WAIT", "OWNER", "FENCE"]).bold();
    let table = Table::new(page, widths).header(head).row_highlight_style(Style::new().reversed());
    frame.render_stateful_widget(table, area, &mut TableState::new().with_selected(selected));
}

fn table_row(row: &Row<'_>) -> TableRow<'static> {
    let waiters = &row.key.waiters;
    let longest = waiters.iter().map(|waiter| waiter.age).max().map(for_people).unwrap_or_default();
    let (word, span) = match (row.holder, row.key.closed_for) {
        (Some(holder), _) => (if holder.lingers { "lingers" } else { "held" }, for_people(holder.age)),
        (None, Some(left)) => ("closed", for_people(left)),
        (None, None) => ("free", String::new()),
    };
    let owner = row.holder.map(|holder| cell(&holder.owner)).unwrap_or_default();
    let fence = row.holder.map(|holder| holder.fence.get().to_string()).unwrap_or_default();
    let waiting = waiters.len().to_string();
    TableRow::new([cell(row.key.key.name()), word.to_owned(), span, waiting, longest, owner, fence])
}

/// Describes the selected row: its metadata, its limits, its queue.
fn about(row: &Row<'_>, area: Rect) -> Paragraph<'static> {
    let mut lines = Vec::new();
    if let Some(holder) = row.holder {
        let ends = holder.remaining.map(|left| format!(", for another {} at most", for_people(left)));
        lines.push(format!(
            "held by {} for {}{}",
            escape(&holder.owner),
            for_people(holder.age),
            ends.unwrap_or_default()
        ));
        if holder.capacity > 1 {
            lines.push(format!("units {}, with {}", holder.units, limit(holder.capacity)));
        }
        if let Some(text) = &holder.metadata {
            lines.push(format!("metadata {}", escape(text)));
        }
    }
    // The title, and a line for the rest of the queue.
    let room = usize::from(area.height).saturating_sub(lines.len() + 2);
    for (place, waiter) in row.key.waiters.iter().take(room).enumerate() {
        let metadata = waiter.metadata.as_deref().map(|text| format!(" ({})", cell(text))).unwrap_or_default();
        let (owner, age) = (escape(&waiter.owner), for_people(waiter.age));
        lines.push(format!("waiter {}  {owner}{metadata}, for {age}", place + 1));
    }
    if row.key.waiters.len() > room {
        lines.push(format!("and {} more", row.key.waiters.len() - room));
    }
    let title = Line::raw(format!(" {} ", cell(row.key.key.name())));
    let lines: Vec<_> = lines.into_iter().map(|line| Line::raw(format!(" {line}"))).collect();
    Paragraph::new(lines).block(Block::new().borders(Borders::TOP).title(title))
}

fn draw_dialog(frame: &mut Frame<'_>, dialog: &Dialog) {
    let area = frame.area();
    let [area] = Layout::horizontal([Constraint::Max(76)]).flex(Flex::Center).areas(area);
    let [area] = Layout::vertical([Constraint::Max(9)]).flex(Flex::Center).areas(area);
    let ask = match (dialog.is_confirming, dialog.reason.trim().is_empty()) {
        (true, _) => "End this hold now?   y: yes   any other key: no",
        (false, true) => "Why? Its user sees the text.   Esc: cancel",
        (false, false) => "Enter: go on   Esc: cancel",
    };
    let lines = vec![
        Line::raw(format!("key     {}", cell(&dialog.key))),
        Line::raw(format!("holder  {}", cell(&dialog.owner))),
        Line::raw(format!("fence   {}", dialog.fence.get())),
        Line::raw("A command that runs under this hold is ended at once."),
        Line::default(),
        Line::raw(format!("reason  {}_", tail(&dialog.reason, usize::from(area.width).saturating_sub(14)))).bold(),
        Line::raw(ask).bold(),
    ];
    frame.render_widget(Clear, area);
    let block = Block::bordered().padding(Padding::horizontal(1)).title(" force-release ");
    frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: false }).block(block), area);
}

/// Returns the end of a text that is being typed.
fn tail(text: &str, width: usize) -> String {
    let skipped = text.chars().count().saturating_sub(width);
    text.chars().skip(skipped).collect()
}
