//! Settings of a role as flags. Values stay text, because a file and the environment give the same settings and
//! `muster-config` parses whichever takes precedence.

use std::marker::PhantomData;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};
use muster_config::{DefaultTo, Flags, Group, Key, LOGGING, RoleSettings};

/// Given flags of a role's settings.
#[derive(Debug)]
pub(crate) struct SettingArgs<R> {
    pub(crate) flags: Flags,
    role: PhantomData<R>,
}

impl<R: RoleSettings> Args for SettingArgs<R> {
    fn augment_args(command: Command) -> Command {
        let arguments = groups::<R>().flat_map(|group| group.keys.iter().map(|key| argument(key, group)));
        command.args(arguments)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<R: RoleSettings> FromArgMatches for SettingArgs<R> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
        let given = |flags: Flags, key: &'static Key| match key.placeholder() {
            None if matches.get_flag(key.name()) => flags.on(key.name()),
            None => flags,
            Some(_) if key.is_list() => {
                let values: Vec<String> =
                    matches.get_many(key.name()).into_iter().flatten().cloned().collect();
                flags.list(key.name(), &values)
            }
            Some(_) => flags.text(key.name(), matches.get_one::<String>(key.name()).map(String::as_str)),
        };
        let flags = groups::<R>().flat_map(|group| group.keys).fold(Flags::new(), given);
        Ok(Self { flags, role: PhantomData })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// All groups but those of every command.
fn groups<R: RoleSettings>() -> impl Iterator<Item = &'static Group> {
    R::ROLE.groups.iter().filter(|group| group.heading != Some(LOGGING))
}

fn argument(key: &'static Key, group: &Group) -> Arg {
    let help = key.help();
    let help = help.trim_end_matches('.');
    let each = if key.is_list() { "; given once for each" } else { "" };
    let default = match (key.default(), key.placeholder()) {
        (DefaultTo::Value(default) | DefaultTo::Words(default), Some(_)) => {
            format!(" [default: {}]", default.replace('`', ""))
        }
        _ => String::new(),
    };
    let argument = Arg::new(key.name())
        .long(key.flag())
        .help(format!("{}{each}{default}", help.replace('`', "")))
        .help_heading(group.heading);
    match key.placeholder() {
        None => argument.action(ArgAction::SetTrue),
        Some(placeholder) if key.is_list() => argument.value_name(placeholder).action(ArgAction::Append),
        Some(placeholder) => argument.value_name(placeholder),
    }
}
