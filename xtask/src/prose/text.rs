//! The texts that the check reads, whatever file they are from.

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
