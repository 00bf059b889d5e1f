//! Draws the model. Nothing here changes it, except for the position of the window in the table.
//!
//! ```text
//! the host, or the reason why it does not answer
//! numbers of machines                             24 rows and 80 columns are enough. More rows show more machines,
//! actions: rates and durations                    and more columns show remarks in the table.
//! machines
//! remarks about the selected machine
//! the latest result
//! keys
//! ```

use machinery::format_bytes;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{self, Block, Clear, Paragraph, Table, Wrap};
use serde_json::Value;

use super::clock::Now;
use super::keys::KEYS;
use super::machine;
use super::model::{Action, Dialogue, Link, Model};
use super::rates::Figures;
use super::table::Order;
use super::theme::Theme;
use crate::cli::clones::{self, Row};
use crate::cli::machines::{duration, standby_memory, template_disk};
use crate::cli::status::counts;
use crate::logging::on_one_line;

/// The columns of machines: head, width, and the order by it.
const COLUMNS: [(&str, u16, Order); 8] = [
    ("NAME", 15, Order::Configured),
    ("STATE", 10, Order::State),
    ("RUN", 6, Order::Run),
    ("TASK", 17, Order::Task),
    ("USER", 8, Order::Task),
    ("LOCK", 6, Order::Lock),
    ("MODE", 7, Order::Mode),
    ("ERR", 3, Order::Errors),
];
/// The width of all columns with the spaces between them.
const WIDTH: u16 = 79;
/// The width from which remarks have a column of their own.
const MIN_REMARKS: u16 = 20;
/// The columns of actions: head and width.
const ACTION_COLUMNS: [(&str, u16); 9] = [
    ("MACHINERY", 10),
    ("ACTION", 15),
    ("MODE", 8),
    ("/MIN", 5),
    ("COUNT", 7),
    ("FAILED", 6),
    ("P50", 6),
    ("P99", 6),
    ("LONGEST", 7),
];

/// Draws the screen.
pub fn draw(frame: &mut Frame<'_>, model: &mut Model, theme: Theme, now: Now) {
    let actions = u16::try_from(model.rates.last_minute(now.instant).len()).unwrap_or(u16::MAX);
    let actions = actions.min((frame.area().height / 6).max(1));
    let rows = [1, 1, actions + 1].map(Constraint::Length);
    let below = [2, 1, 1].map(Constraint::Length);
    let areas =
        Layout::vertical(rows.into_iter().chain([Constraint::Min(2)]).chain(below)).split(frame.area());
    frame.render_widget(title(model, theme, now), areas[0]);
    frame.render_widget(summary(model), areas[1]);
    draw_actions(frame, areas[2], model, theme, now);
    draw_machines(frame, areas[3], model, theme, now);
    frame.render_widget(remarks(model, now), areas[4]);
    frame.render_widget(Line::raw(notice(model)), areas[5]);
    let keys = "q quit  ? help  / filter  o order  f fold  s stop  d disable  e enable  p screen";
    frame.render_widget(Line::raw(keys).style(theme.selected()), areas[6]);
    match &model.dialogue {
        Dialogue::Help => draw_window(frame, theme, " Keys ", help()),
        Dialogue::Confirm(action, machine) => {
            draw_window(frame, theme, " Confirm ", confirmation(model, *action, machine));
        }
        Dialogue::Table | Dialogue::Filter => {}
    }
}

fn title(model: &Model, theme: Theme, now: Now) -> Line<'static> {
    match &model.link {
        Link::Lost(reason) => {
            let text = format!("NO HOST: {}. Trying again every second", on_one_line(reason));
            Line::raw(text).style(theme.trouble().patch(theme.selected()))
        }
        Link::Up => {
            let started = model.version["started"].as_u64().map_or(now.unix, |started| started / 1000);
            let age = duration(now.unix.saturating_sub(started));
            let (version, pid) = (machine::text(&model.version, "version"), &model.version["pid"]);
            Line::raw(format!("cuckoo-machinery {version}, process {pid}, running for {age}"))
        }
    }
}

fn summary(model: &Model) -> Line<'static> {
    let [(_, all), others @ ..] = counts(&model.machines);
    let others = others.iter().filter(|(_, count)| *count > 0);
    let others: String = others.map(|(what, count)| format!(", {count} {what}")).collect();
    let sizes = [standby_memory(&model.machines), template_disk(&model.machines)];
    let [memory, disk] = sizes.map(format_bytes);
    Line::raw(format!("{all} machines{others}; standbys {memory}, templates {disk}"))
}

fn draw_actions(frame: &mut Frame<'_>, area: Rect, model: &Model, theme: Theme, now: Now) {
    let heads = widgets::Row::new(ACTION_COLUMNS.map(|(head, _)| head)).style(theme.head(false));
    let row = |(figures, recent): (&Figures, u64)| {
        let Figures { key: [machinery, action, mode], count, failed, times } = figures;
        let texts = [machinery, action, mode].map(|text| on_one_line(text).into_owned());
        let counts = [recent, *count, *failed].map(|number| number.to_string());
        let cells = texts.into_iter().chain(counts).chain(times.map(milliseconds));
        let style = if *failed > 0 { theme.trouble() } else { Default::default() };
        let style = |column: usize| if column == 5 { style } else { Default::default() };
        widgets::Row::new(
            cells.enumerate().map(|(column, cell)| Text::styled(cell, style(column))).collect::<Vec<_>>(),
        )
    };
    let rows = model.rates.last_minute(now.instant).into_iter().map(row);
    frame.render_widget(Table::new(rows, ACTION_COLUMNS.map(|(_, width)| width)).header(heads), area);
}

/// Formats milliseconds in at most six characters.
fn milliseconds(time: f64) -> String {
    match time {
        ..10.0 => format!("{time:.1}ms"),
        10.0..1000.0 => format!("{time:.0}ms"),
        1000.0..100_000.0 => format!("{:.1}s", time / 1000.0),
        _ => format!("{:.0}s", time / 1000.0),
    }
}

fn draw_machines(frame: &mut Frame<'_>, area: Rect, model: &mut Model, theme: Theme, now: Now) {
    model.table.refresh(&model.machines);
    let order = model.table.order;
    let spare = area.width.saturating_sub(WIDTH);
    let has_remarks = spare > MIN_REMARKS;
    let mut widths = COLUMNS.map(|(_, width, _)| Constraint::Length(width)).to_vec();
    let mut heads =
        COLUMNS.map(|(head, _, by)| Span::styled(head, theme.head(by == order && head != "USER"))).to_vec();
    if has_remarks {
        widths.push(Constraint::Fill(1));
        heads.push(Span::styled("REMARKS", theme.head(false)));
    } else {
        widths[0] = Constraint::Length(COLUMNS[0].1 + spare);
    }
    let (window, selected) = model.table.window(usize::from(area.height.saturating_sub(1)));
    let window = window.to_vec();
    let shown = |(position, row): (usize, &Row)| {
        let cells = match &row.clone_of {
            Some(of) => vec![Span::raw(on_one_line(&clones::title(of, &members(model, row))).into_owned())],
            None => cells(model, &model.machines[row.members[0]], theme, has_remarks, now),
        };
        let line = widgets::Row::new(cells);
        if position == selected { line.style(theme.selected()) } else { line }
    };
    let rows = window.iter().enumerate().map(shown);
    frame.render_widget(Table::new(rows, widths).header(widgets::Row::new(heads)), area);
    let name = COLUMNS[0].1 + if has_remarks { 0 } else { spare };
    for (y, row) in (area.y + 1..).zip(&window) {
        if row.clone_of.is_some() {
            let rest = Rect { x: area.x + name + 1, y, width: area.width, height: 1 };
            frame.render_widget(clones_line(&members(model, row), theme), rest.intersection(area));
        }
    }
}

/// Returns the machines of a row.
fn members<'a>(model: &'a Model, row: &Row) -> Vec<&'a Value> {
    row.members.iter().filter_map(|index| model.machines.get(*index)).collect()
}

/// Returns the text of a row of clones, which follows its name.
fn clones_line(members: &[&Value], theme: Theme) -> Line<'static> {
    let remarks = Some(clones::remarks(members)).filter(|remarks| !remarks.is_empty());
    let texts = [Some(clones::states(members)), Some(clones::modes(members)), remarks];
    let text = texts.into_iter().flatten().collect::<Vec<_>>().join("; ");
    let is_out = members.iter().any(|member| member["disabled"] == true);
    let style = if is_out { theme.state("disabled") } else { Default::default() };
    Line::styled(on_one_line(&text).into_owned(), style)
}

fn cells(model: &Model, machine: &Value, theme: Theme, has_remarks: bool, now: Now) -> Vec<Span<'static>> {
    let state = machine::state(machine);
    let errors = machine::errors(machine);
    let plain = |text: &str| Span::raw(on_one_line(text).into_owned());
    let mut cells = vec![
        plain(machine::text(machine, "name")),
        Span::styled(state.to_owned(), theme.state(state)),
        plain(&machine::run(machine, now.unix)),
        plain(&machine::task(machine)),
        plain(model.user(machine)),
        plain(&machine::short_age(machine::locked_since(machine), now.unix)),
        plain(machine::mode(machine)),
        if errors > 0 { Span::styled(errors.to_string(), theme.trouble()) } else { Span::raw("") },
    ];
    if has_remarks {
        cells.push(plain(&machine::remarks(machine, now.unix)));
    }
    cells
}

/// Returns the remarks about the selected machine.
fn remarks(model: &Model, now: Now) -> Paragraph<'static> {
    let folded = model.table.selected_row().and_then(|row| Some((row.clone_of.as_ref()?, row)));
    if let Some((of, row)) = folded {
        let members = members(model, row);
        let remarks = Some(clones::remarks(&members)).filter(|remarks| !remarks.is_empty());
        let about = format!("{}: clones of one snapshot, f shows each", clones::title(of, &members));
        let text = [Some(about), remarks].into_iter().flatten().collect::<Vec<_>>().join("; ");
        return Paragraph::new(on_one_line(&text).into_owned()).wrap(Wrap { trim: true });
    }
    let Some(selected) = model.selected() else { return Paragraph::new("no machine is shown") };
    let text = |key: &str| machine::text(selected, key);
    let platform = [text("platform"), text("os_version"), text("architecture")].join(" ");
    let about = format!("{} ({}, {platform}, {})", text("name"), text("machinery_name"), text("ip"));
    let remarks = Some(machine::remarks(selected, now.unix)).filter(|remarks| !remarks.is_empty());
    let error = machine::latest_error(selected).map(|error| format!("latest error: {error}"));
    let all: Vec<String> = [Some(about), remarks, error].into_iter().flatten().collect();
    Paragraph::new(on_one_line(&all.join("; ")).into_owned()).wrap(Wrap { trim: true })
}

/// Returns the line of the filter, the order and the latest result.
fn notice(model: &Model) -> String {
    let table = &model.table;
    let cursor = if model.dialogue == Dialogue::Filter { "_" } else { "" };
    let shown = format!(" ({} of {})", table.len(), model.machines.len());
    let filter = format!("filter: {}{cursor}{shown}", on_one_line(&table.filter));
    let has_filter = !table.filter.is_empty() || !cursor.is_empty();
    let reversed = table.reversed.then(|| "reversed".to_owned());
    let notice = Some(on_one_line(&model.notice).into_owned()).filter(|notice| !notice.is_empty());
    [Some(filter).filter(|_| has_filter), reversed, notice]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join("; ")
}

fn help() -> Vec<String> {
    KEYS.iter().map(|(keys, effect)| format!("{keys:22}  {effect}")).collect()
}

fn confirmation(model: &Model, action: Action, name: &str) -> Vec<String> {
    let machine = model.machines.iter().find(|machine| machine::text(machine, "name") == name);
    let task = machine.map(machine::task).filter(|task| !task.is_empty());
    let mut verb = action.verb().to_owned();
    verb[..1].make_ascii_uppercase();
    let mut lines = vec![format!("{verb} {}?", on_one_line(name))];
    lines.extend(task.map(|task| format!("The task {} has it.", on_one_line(&task))));
    lines.extend([String::new(), "y yes   n no".to_owned()]);
    lines
}

/// Draws lines in a window in the middle of the screen.
fn draw_window(frame: &mut Frame<'_>, theme: Theme, title: &str, lines: Vec<String>) {
    let width = lines.iter().map(|line| line.chars().count()).chain([title.len()]).max().unwrap_or(0);
    let size = |content: usize| u16::try_from(content + 2).unwrap_or(u16::MAX);
    let area = frame.area().centered(
        Constraint::Length(size(width).min(frame.area().width)),
        Constraint::Length(size(lines.len()).min(frame.area().height)),
    );
    frame.render_widget(Clear, area);
    let block = Block::bordered().title(title.to_owned()).title_style(theme.head(false));
    frame.render_widget(Paragraph::new(lines.join("\n")).block(block), area);
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::style::Color;
    use serde_json::json;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    /// Returns a model of a lab with that many machines.
    fn model(count: usize) -> (Model, Now) {
        let (mut model, now) = (Model::default(), Now { unix: NOW, instant: Instant::now() });
        let machine = |number: usize| {
            let is_on = number.is_multiple_of(3);
            json!({"name": format!("win10_{number}"), "machinery_name": "qemu", "platform": "windows", "os_version": "10",
                "architecture": "amd64", "ip": "10.0.0.1", "state": if is_on { "running" } else { "poweroff" },
                "running_since": is_on.then_some(NOW - 125), "locked": is_on, "locked_by": "20261124-ABCDEF_1",
                "locked_since": NOW - 7500, "locked_uid": 0, "disabled": number == 2, "quarantine": null,
                "disabled_reason": "QEMU was killed", "ready": {"mode": "standby", "memory": 1 << 20, "disk": 1 << 30},
                "errors": vec!["it failed"; number % 2], "run_errors": []})
        };
        let machines: Vec<Value> = (1..=count).map(machine).collect();
        model.connected(json!({"version": "0.2.0", "pid": 4711, "started": (NOW - 60) * 1000}));
        model.receive(&json!({"id": "list", "machines": machines}), now);
        let figures = |action: &str, mode: Option<&str>| {
            json!({"machinery": "qemu", "action": action, "mode": mode, "step": null, "count": 1234, "failed": 2,
                "p50_ms": 1.24, "p99_ms": 62.4, "max_ms": 1_234.0})
        };
        let metrics = [figures("restore_start", Some("standby")), figures("norestore_start", None)];
        model.receive(&json!({"id": "metrics", "metrics": metrics}), now);
        (model, now)
    }

    fn drawn(
        model: &mut Model,
        now: Now,
        (width, height): (u16, u16),
        has_colours: bool,
    ) -> Terminal<TestBackend> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model, Theme { has_colours }, now)).unwrap();
        terminal
    }

    fn lines(model: &mut Model, now: Now, size: (u16, u16)) -> Vec<String> {
        let terminal = drawn(model, now, size, true);
        let buffer = terminal.backend().buffer();
        let line = |row: u16| (0..size.0).map(|column| buffer[(column, row)].symbol()).collect::<String>();
        (0..size.1).map(|row| line(row).trim_end().to_owned()).collect()
    }

    #[test]
    fn screen_of_80_by_24_has_the_host_the_actions_and_the_machines() {
        let (mut model, now) = model(100);
        let lines = lines(&mut model, now, (80, 24));
        assert_eq!(lines[0], "cuckoo-machinery 0.2.0, process 4711, running for 1 min 0 s");
        let expected = "100 machines, 33 on, 33 locked, 1 disabled; standbys 100 MiB, templates 100 GiB";
        assert_eq!(lines[1], expected);
        assert_eq!(
            lines[2],
            "MACHINERY  ACTION          MODE     /MIN  COUNT   FAILED P50    P99    LONGEST"
        );
        assert_eq!(lines[3], "qemu       restore_start   standby  0     1234    2      1.2ms  62ms   1.2s");
        assert_eq!(
            lines[5],
            "NAME             STATE      RUN    TASK              USER     LOCK   MODE    ERR"
        );
        assert_eq!(lines[7], "win10_2          disabled                                            standby");
        assert_eq!(
            lines[8],
            "win10_3          running    2m5s   20261124-ABCDEF_1 root     2h5m   standby 1"
        );
        assert_eq!(lines[20], "win10_1 (qemu, windows 10 amd64, 10.0.0.1); latest error: it failed");
        assert!(lines[23].starts_with("q quit  ? help") && lines[23].len() <= 80, "{}", lines[23]);
    }

    #[test]
    fn clones_are_one_line_with_their_states_and_names_in_trouble() {
        let (mut model, now) = model(9);
        for machine in &mut model.machines[..8] {
            machine["clone_of"] = json!("win10");
        }
        let folded = lines(&mut model, now, (80, 24));
        let expected = "win10 ×8         5 ready, 2 running, 1 disabled; 8 standby; 4 with errors; disab";
        assert_eq!(folded[6], expected);
        assert!(folded[7].starts_with("win10_9"), "{}", folded[7]);
        let remarks = [folded[20].as_str(), folded[21].as_str()].join(" ");
        let expected =
            "win10 ×8: clones of one snapshot, f shows each; 4 with errors; disabled: win10_2; 2 locked";
        assert_eq!(remarks, expected);
        model.table.fold(&model.machines);
        assert!(lines(&mut model, now, (80, 24))[6].starts_with("win10_1 "));
        for size in [(1, 1), (16, 9), (17, 12)] {
            model.table.fold(&model.machines);
            lines(&mut model, now, size);
        }
    }

    #[test]
    fn remarks_have_a_column_when_the_screen_is_wide() {
        let (mut model, now) = model(3);
        let lines = lines(&mut model, now, (130, 30));
        assert!(lines[7].ends_with("disabled: QEMU was killed"), "{}", lines[7]);
    }

    #[test]
    fn screen_without_colours_has_none_and_shows_trouble_in_bold() {
        let (mut model, now) = model(10);
        let coloured = |model: &mut Model, has_colours| {
            let terminal = drawn(model, now, (80, 24), has_colours);
            let cells = terminal.backend().buffer().content().to_vec();
            cells.iter().any(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset)
        };
        assert!(coloured(&mut model, true) && !coloured(&mut model, false));
        let terminal = drawn(&mut model, now, (80, 24), false);
        let cell = &terminal.backend().buffer()[(17, 7)];
        assert_eq!((cell.symbol(), cell.modifier), ("d", ratatui::style::Modifier::BOLD));
    }

    #[test]
    fn lost_host_is_shown_instead_of_its_process() {
        let (mut model, now) = model(1);
        model.lost("it closed the\nconnection");
        let lines = lines(&mut model, now, (80, 24));
        assert_eq!(lines[0], "NO HOST: it closed the\\nconnection. Trying again every second");
        assert!(lines[6].starts_with("win10_1"), "its last machines remain: {lines:#?}");
    }

    #[test]
    fn confirmation_names_the_machine_and_its_task() {
        let (mut model, now) = model(3);
        model.dialogue = Dialogue::Confirm(Action::Stop, "win10_3".into());
        let shown = lines(&mut model, now, (80, 24)).join("\n");
        assert!(
            shown.contains("Stop win10_3?") && shown.contains("The task 20261124-ABCDEF_1 has it."),
            "{shown}"
        );
    }

    #[test]
    fn page_of_the_keys_has_each_key() {
        let (mut model, now) = model(3);
        model.dialogue = Dialogue::Help;
        let shown = lines(&mut model, now, (80, 24)).join("\n");
        for (keys, effect) in KEYS {
            assert!(shown.contains(keys) && shown.contains(effect), "{keys}: {shown}");
        }
    }

    #[test]
    fn any_size_and_any_text_is_drawn() {
        for size in [(1, 1), (2, 5), (20, 6), (79, 11), (300, 100)] {
            let (mut model, now) = model(40);
            model.machines[0]["name"] = json!("\u{1b}[2Jwide: 日本語\u{202e}");
            for dialogue in [Dialogue::Help, Dialogue::Filter, Dialogue::Confirm(Action::Disable, "x".into())]
            {
                model.dialogue = dialogue;
                lines(&mut model, now, size);
            }
        }
        let (mut empty, now) = (Model::default(), Now::present());
        lines(&mut empty, now, (80, 24));
    }

    #[test]
    fn time_is_short() {
        for (time, expected) in
            [(0.04, "0.0ms"), (9.94, "9.9ms"), (999.4, "999ms"), (61_234.0, "61.2s"), (1e6, "1000s")]
        {
            assert_eq!(milliseconds(time), expected);
        }
    }
}
