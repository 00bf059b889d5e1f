//! The texts of files that are not Rust: paragraphs of Markdown, comments that begin with `#`.

use super::text::{Kind, Text};

/// Divides Markdown into paragraphs. Headings, list items and table rows are paragraphs of their own.
pub fn markdown(content: &str) -> Vec<Text> {
    paragraphs(content.lines().enumerate().map(|(index, line)| (index + 1, line.to_owned())))
}

/// Joins lines of prose to paragraphs, and removes the marks before them and their inline code.
pub fn paragraphs(lines: impl Iterator<Item = (usize, String)>) -> Vec<Text> {
    let mut texts: Vec<Text> = Vec::new();
    let mut open = false;
    for (number, line) in lines {
        let words = line.trim().trim_start_matches(MARKS).trim_start();
        let begins = line.trim_start().starts_with(MARKS) || line.trim_start().starts_with("```");
        match texts.last_mut() {
            _ if words.is_empty() => {}
            Some(text) if open && !begins => text.lines.push((number, words.to_owned())),
            _ => texts.push(Text { kind: Kind::Prose, lines: vec![(number, words.to_owned())] }),
        }
        // A heading ends with its line.
        open = !words.is_empty() && !line.trim_start().starts_with('#');
    }
    texts.iter_mut().for_each(drop_inline_code);
    texts
}

/// Signs before the words of a heading, list item, quotation or table row.
const MARKS: &[char] = &['#', '-', '*', '>', '|', '+'];

/// Divides a script or configuration file into its comments and its other lines.
pub fn hash_comments(content: &str) -> Vec<Text> {
    let (mut comments, mut texts) = (Vec::new(), Vec::new());
    for (index, line) in content.lines().enumerate() {
        let trimmed = line.trim();
        if let Some(comment) = trimmed.strip_prefix('#') {
            comments.push((index + 1, comment.trim_start_matches(['#', ':']).to_owned()));
            continue;
        }
        comments.push((index + 1, String::new()));
        let code = trimmed.trim_start_matches(['"', '\'']);
        texts.push(Text { kind: Kind::Code, lines: vec![(index + 1, code.to_owned())] });
    }
    texts.extend(paragraphs(comments.into_iter()));
    texts.retain(|text| text.lines.iter().any(|(_, line)| !line.is_empty()));
    texts
}

/// Empties the text between backticks, also where it goes over a line's end.
fn drop_inline_code(text: &mut Text) {
    let mut inside = false;
    for (_, line) in &mut text.lines {
        if line.starts_with("```") {
            return;
        }
        let mut keep = |c: char| {
            inside ^= c == '`';
            c == '`' || !inside
        };
        *line = line.chars().filter(|c| keep(*c)).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(texts: &[Text]) -> Vec<Vec<&str>> {
        texts.iter().map(|text| text.lines.iter().map(|(_, line)| line.as_str()).collect()).collect()
    }

    #[test]
    fn markdown_is_divided_into_paragraphs_and_items() {
        let texts = markdown("# Title\nOne\ntwo.\n\n- item\n  more\n- `told` next\n| cell |\n");
        let wanted =
            [vec!["Title"], vec!["One", "two."], vec!["item", "more"], vec!["`` next"], vec!["cell |"]];
        assert_eq!(lines(&texts), wanted);
    }

    #[test]
    fn script_is_divided_into_comments_and_lines() {
        let texts = hash_comments("#!/bin/sh\n# One\n# two.\nrun\n\"\"\"What it does\n");
        assert_eq!(lines(&texts), [vec!["run"], vec!["What it does"], vec!["!/bin/sh", "One", "two."]]);
    }
}
