//! Which layers of the jail hold, and why the others do not.

use std::fmt;

use machinery_jail::NOT_ROOT;

/// The layers of one machine: for each the reason why it does not hold, if it does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layers {
    /// Files, system calls, descriptors, environment, limits.
    pub a: Option<String>,
    /// A user of the machine's own, namespaces.
    pub b: Option<String>,
    /// A cgroup.
    pub c: Option<String>,
}

impl Layers {
    /// No layer holds, all for the same reason.
    pub fn none(why: &str) -> Layers {
        let why = Some(why.to_owned());
        Layers { a: why.clone(), b: why.clone(), c: why }
    }

    /// Returns the reason why a strict jail refuses the machine, if it does.
    pub fn missing_in_strict(&self) -> Option<String> {
        let missing = [("A", &self.a), ("B", &self.b)];
        missing
            .into_iter()
            .find_map(|(name, why)| Some(format!("layer {name} does not hold: {}", why.as_ref()?)))
    }

    /// Reports whether a layer does not hold for this machine, although this host applies it to others.
    pub fn is_weakened_by_machine(&self) -> bool {
        self.a.is_none() && self.b.as_deref().is_some_and(|why| why != NOT_ROOT)
    }

    /// Returns the names of the layers that hold, such as `A+B`; `off` if none does.
    pub fn names(&self) -> String {
        let all = [("A", &self.a), ("B", &self.b), ("C", &self.c)];
        let hold: Vec<&str> =
            all.into_iter().filter(|(_, why)| why.is_none()).map(|(name, _)| name).collect();
        if hold.is_empty() { "off".to_owned() } else { hold.join("+") }
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.names())?;
        let all = [("A", &self.a), ("B", &self.b), ("C", &self.c)];
        let mut said: Vec<&str> = Vec::new();
        for (name, why) in all {
            if let Some(why) = why.as_deref().filter(|why| !said.contains(why)) {
                write!(f, "; not {name}: {why}")?;
                said.push(why);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_say_which_hold_and_why_the_others_do_not() {
        let layers = Layers { a: None, b: Some("no root".into()), c: Some("no cgroup".into()) };
        assert_eq!(layers.to_string(), "A; not B: no root; not C: no cgroup");
        assert_eq!(layers.missing_in_strict().unwrap(), "layer B does not hold: no root");
        assert_eq!(Layers { b: None, ..layers }.missing_in_strict(), None);
        assert_eq!(Layers::none("jail: off").to_string(), "off; not A: jail: off");
    }
}
