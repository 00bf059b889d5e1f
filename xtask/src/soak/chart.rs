//! The matrix as a picture: a field for each cell, with the number of its hits.
//!
//! The picture has no background, and only colours that are visible on black and on white.

use std::fmt::Display;

use super::cells::{Cell, Phase};
use super::matrix::Matrix;
use super::report::entry;

/// The width of the faults' names, and the size of a field.
const NAMES: f64 = 150.0;
const FIELD: (f64, f64) = (80.0, 24.0);
const HEAD: f64 = 60.0;
const TEXT: &str = "#7d8590";
const HIT: &str = "#2ea043";
const OPEN: &str = "#8b949e";
const VIOLATED: &str = "#da3633";

/// Returns the picture as SVG.
pub fn svg(matrix: &Matrix) -> String {
    let title = format!(
        "{}: {} rounds with a fault in a phase, {} with violations",
        matrix.machinery.name(),
        matrix.rounds,
        matrix.violations.len()
    );
    let mut body = text(0.0, 16.0, "start", TEXT, &title);
    for (column, phase) in Phase::ALL.into_iter().enumerate() {
        body += &text(left(column) + FIELD.0 / 2.0, HEAD - 8.0, "middle", TEXT, &phase.name());
    }
    let faults: Vec<_> = matrix.faults().collect();
    for (row, fault) in faults.iter().enumerate() {
        let top = HEAD + row as f64 * FIELD.1;
        body += &text(NAMES - 8.0, top + FIELD.1 * 0.7, "end", TEXT, &fault.name());
        for (column, phase) in Phase::ALL.into_iter().enumerate() {
            body += &field(matrix, Cell { fault: *fault, phase }, left(column), top);
        }
    }
    let (width, height) = (left(Phase::ALL.len()), HEAD + faults.len() as f64 * FIELD.1 + 8.0);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n{body}</svg>\n"
    )
}

fn left(column: usize) -> f64 {
    NAMES + column as f64 * FIELD.0
}

fn field(matrix: &Matrix, cell: Cell, x: f64, y: f64) -> String {
    let tally = matrix.tally(cell);
    let colour = match (matrix.impossible(cell), tally.violations, tally.hits) {
        (Some(_), ..) => return String::new(),
        (None, 1.., _) => VIOLATED,
        (None, 0, 0) => OPEN,
        (None, 0, 1..) => HIT,
    };
    let (width, height) = (FIELD.0 - 2.0, FIELD.1 - 2.0);
    let field = format!(
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width}\" height=\"{height}\" fill=\"{colour}\"/>\n"
    );
    field + &text(x + width / 2.0, y + FIELD.1 * 0.7, "middle", "#ffffff", &entry(matrix, cell))
}

/// Returns a text element. The text must not contain characters of XML's own.
fn text(x: f64, y: f64, anchor: &str, colour: &str, text: &dyn Display) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{text}</text>\n")
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::matrix;
    use super::*;

    #[test]
    fn picture_has_a_field_for_each_cell_that_can_be_hit() {
        let matrix = matrix();
        let svg = svg(&matrix);
        assert_eq!(svg.matches("<rect").count(), matrix.possible().len());
        assert!(svg.contains(">1 ?1 !1<") && svg.contains(VIOLATED), "{svg}");
    }
}
