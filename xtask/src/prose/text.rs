//! What the check reads, and what it finds.

/// A place in a file where a phrase was found.
#[derive(Debug, PartialEq)]
pub struct Finding {
    pub path: String,
    pub line: usize,
    pub phrase: String,
    pub suggestion: String,
}

/// The kind of a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// A paragraph of a comment or document.
    Prose,
    /// A string literal, or a line of code in a file that is not Rust.
    Code,
    /// The name of a test function.
    TestName,
}

/// A piece of a file that the check reads.
#[derive(Debug, PartialEq)]
pub struct Text {
    pub kind: Kind,
    /// The lines, without comment signs, and their numbers.
    pub lines: Vec<(usize, String)>,
}
