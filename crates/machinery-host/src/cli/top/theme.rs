//! The styles of the screen. Without colours, the same facts are shown by words, bold and inverse text.

use ratatui::style::{Color, Modifier, Style};

/// The styles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Theme {
    /// True if colours are shown.
    pub has_colours: bool,
}

impl Theme {
    /// Returns the styles for this environment. Source: no-color.org.
    pub fn of_environment() -> Self {
        Theme { has_colours: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) }
    }

    fn coloured(self, colour: Color) -> Style {
        if self.has_colours { Style::new().fg(colour) } else { Style::new() }
    }

    /// Returns the style of a machine's state.
    pub fn state(self, state: &str) -> Style {
        match state {
            "error" => self.trouble(),
            "disabled" | "quarantine" => self.coloured(Color::Yellow).add_modifier(Modifier::BOLD),
            "running" => self.coloured(Color::Green),
            "starting" | "stopping" | "paused" | "suspended" | "restored" => self.coloured(Color::Cyan),
            _ => Style::new(),
        }
    }

    /// Returns the style of failures.
    pub fn trouble(self) -> Style {
        self.coloured(Color::Red).add_modifier(Modifier::BOLD)
    }

    /// Returns the style of the heads of columns.
    pub fn head(self, is_order: bool) -> Style {
        let order = if is_order { Modifier::UNDERLINED } else { Modifier::empty() };
        Style::new().add_modifier(Modifier::BOLD | order)
    }

    /// Returns the style of the selected row, and of the keys.
    pub fn selected(self) -> Style {
        Style::new().add_modifier(Modifier::REVERSED)
    }
}
