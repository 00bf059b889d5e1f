//! The keys: from a key to a change of the model, or to an effect beyond it.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::model::{Action, Dialogue, Model};
use super::table::Move;

/// The keys and their effects, for the page of the keys.
pub const KEYS: [(&str, &str); 13] = [
    ("Up Down k j", "select a machine"),
    ("PgUp PgDn Home End", "move by a page, or to an end"),
    ("/", "show only machines that have all words you type"),
    ("Esc", "remove the filter"),
    ("o", "order by the next column"),
    ("r", "reverse the order"),
    ("f", "fold or unfold the clones of a machine"),
    ("s", "stop the machine, after a confirmation"),
    ("d", "disable the machine, after a confirmation"),
    ("e", "enable the machine"),
    ("p", "write its screen to NAME.png in the current folder"),
    ("? h", "show or leave this page"),
    ("q Ctrl-C", "quit"),
];

/// An effect of a key beyond the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Quit.
    Quit,
    /// Act on this machine.
    Act(Action, String),
}

/// Takes a key.
pub fn on_key(model: &mut Model, key: KeyEvent) -> Option<Effect> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return (key.code == KeyCode::Char('c')).then_some(Effect::Quit);
    }
    match std::mem::take(&mut model.dialogue) {
        Dialogue::Table => in_table(model, key.code),
        Dialogue::Filter => {
            in_filter(model, key.code);
            None
        }
        Dialogue::Help => None,
        Dialogue::Confirm(action, machine) => match key.code {
            KeyCode::Char('y' | 'Y') => Some(Effect::Act(action, machine)),
            KeyCode::Char('n' | 'N') | KeyCode::Esc | KeyCode::Char('q') => None,
            _ => {
                model.dialogue = Dialogue::Confirm(action, machine);
                None
            }
        },
    }
}

fn in_table(model: &mut Model, key: KeyCode) -> Option<Effect> {
    match key {
        KeyCode::Char('q') => return Some(Effect::Quit),
        KeyCode::Char('?' | 'h') => model.dialogue = Dialogue::Help,
        KeyCode::Char('/') => model.dialogue = Dialogue::Filter,
        KeyCode::Esc => set_filter(model, String::new()),
        KeyCode::Char('o') => model.table.order = model.table.order.next(),
        KeyCode::Char('r') => model.table.reversed = !model.table.reversed,
        KeyCode::Char('f') => model.table.fold(&model.machines),
        KeyCode::Char('s') => confirm(model, Action::Stop),
        KeyCode::Char('d') => confirm(model, Action::Disable),
        KeyCode::Char('e') => return act(model, Action::Enable),
        KeyCode::Char('p') => return act(model, Action::Screenshot),
        key => {
            if let Some(to) = movement(key) {
                model.table.select(to, &model.machines);
            }
        }
    }
    None
}

fn movement(key: KeyCode) -> Option<Move> {
    Some(match key {
        KeyCode::Up | KeyCode::Char('k') => Move::By(-1),
        KeyCode::Down | KeyCode::Char('j') => Move::By(1),
        KeyCode::PageUp => Move::Page(-1),
        KeyCode::PageDown => Move::Page(1),
        KeyCode::Home => Move::First,
        KeyCode::End => Move::Last,
        _ => return None,
    })
}

/// Edits the filter. Enter keeps it, and Esc removes it.
fn in_filter(model: &mut Model, key: KeyCode) {
    let mut filter = model.table.filter.clone();
    model.dialogue = Dialogue::Filter;
    match key {
        KeyCode::Char(letter) => filter.push(letter),
        KeyCode::Backspace => drop(filter.pop()),
        KeyCode::Esc => {
            filter.clear();
            model.dialogue = Dialogue::Table;
        }
        KeyCode::Enter => model.dialogue = Dialogue::Table,
        key => {
            if let Some(to) = movement(key) {
                model.table.select(to, &model.machines);
            }
        }
    }
    set_filter(model, filter);
}

fn set_filter(model: &mut Model, filter: String) {
    model.table.filter = filter;
    model.table.refresh(&model.machines);
}

fn confirm(model: &mut Model, action: Action) {
    if let Some(Effect::Act(action, machine)) = act(model, action) {
        model.dialogue = Dialogue::Confirm(action, machine);
    }
}

fn act(model: &mut Model, action: Action) -> Option<Effect> {
    if model.table.selected_row().is_some_and(|row| row.clone_of.is_some()) {
        model.notice = format!("{}: these are several machines, f shows each", action.verb());
    }
    model.table.selected().map(|machine| Effect::Act(action, machine.to_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::top::clock::Now;

    fn model() -> Model {
        let mut model = Model::default();
        let machines = json!([{"name": "a", "state": "running"}, {"name": "b", "state": "poweroff"}]);
        model.receive(&json!({"id": "list", "machines": machines}), Now::present());
        model
    }

    fn press(model: &mut Model, keys: &[KeyCode]) -> Option<Effect> {
        let mut effect = None;
        for key in keys {
            assert_eq!(effect, None, "before {key:?}");
            effect = on_key(model, KeyEvent::from(*key));
        }
        effect
    }

    fn letters(text: &str) -> Vec<KeyCode> {
        text.chars().map(KeyCode::Char).collect()
    }

    #[test]
    fn stop_and_disable_act_after_a_confirmation_only() {
        for (key, action) in [('s', Action::Stop), ('d', Action::Disable)] {
            let mut model = model();
            assert_eq!(press(&mut model, &letters(&format!("j{key}"))), None);
            assert_eq!(model.dialogue, Dialogue::Confirm(action, "b".into()));
            assert_eq!(press(&mut model, &[KeyCode::Enter, KeyCode::Char('j')]), None, "no answer");
            assert_eq!(press(&mut model, &letters("y")), Some(Effect::Act(action, "b".into())));
            assert_eq!(model.dialogue, Dialogue::Table);
            assert_eq!(press(&mut model, &letters(&format!("{key}n"))), None);
            assert_eq!(model.dialogue, Dialogue::Table);
        }
    }

    #[test]
    fn enable_and_screenshot_act_at_once() {
        let mut model = model();
        assert_eq!(press(&mut model, &letters("e")), Some(Effect::Act(Action::Enable, "a".into())));
        assert_eq!(press(&mut model, &letters("p")), Some(Effect::Act(Action::Screenshot, "a".into())));
        let mut empty = Model::default();
        assert_eq!(press(&mut empty, &letters("epsd")), None);
        assert_eq!(empty.dialogue, Dialogue::Table, "there is no machine to confirm");
    }

    #[test]
    fn clones_take_an_action_only_when_they_are_unfolded() {
        let mut model = Model::default();
        let machines = json!([{"name": "w-1", "clone_of": "w"}, {"name": "w-2", "clone_of": "w"}]);
        model.receive(&json!({"id": "list", "machines": machines}), Now::present());
        assert_eq!(press(&mut model, &letters("sdep")), None);
        assert_eq!((&model.dialogue, model.notice.is_empty()), (&Dialogue::Table, false));
        assert_eq!(press(&mut model, &letters("fje")), Some(Effect::Act(Action::Enable, "w-2".into())));
    }

    #[test]
    fn filter_takes_letters_that_are_commands_otherwise() {
        let mut model = model();
        press(&mut model, &letters("/powerq"));
        assert_eq!((model.table.filter.as_str(), model.table.selected()), ("powerq", None));
        press(&mut model, &[KeyCode::Backspace, KeyCode::Enter]);
        assert_eq!((model.table.selected(), &model.dialogue), (Some("b"), &Dialogue::Table));
        press(&mut model, &[KeyCode::Esc]);
        assert_eq!((model.table.len(), model.table.filter.as_str()), (2, ""));
    }

    #[test]
    fn quit_is_q_in_the_table_and_ctrl_c_everywhere() {
        let mut model = model();
        let ctrl_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        for keys in ["", "/", "?", "s"] {
            press(&mut model, &letters(keys));
            assert_eq!(on_key(&mut model, ctrl_c), Some(Effect::Quit));
            press(&mut model, &[KeyCode::Esc]);
            assert_eq!(model.dialogue, Dialogue::Table);
        }
        assert_eq!(press(&mut model, &letters("q")), Some(Effect::Quit));
    }
}
