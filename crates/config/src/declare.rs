//! Declarations of settings: everything about each in one place, and the types derived from it.

/// Declares settings: `key: type = how(parser), form, default;`, where `how` is the reader's method that takes them. A
/// key's doc comment is its help and its row of the page; paragraphs behind the first are on the page alone. Defines
/// the struct, its parsed values (`Read`), and the table of its keys. Groups behind `with` are fields of the struct as
/// well.
macro_rules! settings {
    (
        $(#[$about:meta])*
        pub struct $name:ident, $read:ident {
            $(
                $(#[doc = $help:literal])*
                $key:ident: $type:ty = $how:ident($parse:expr), $form:expr, $default:expr;
            )*
        }
        $(with { $( $(#[$part_about:meta])* $part:ident: $part_type:ty; )* })?
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $( $(#[doc = $help])* pub $key: $type, )*
            $($( $(#[$part_about])* pub $part: $part_type, )*)?
        }

        /// Parsed values of the settings; `None` where one is wrong.
        pub(crate) struct $read {
            $( pub(crate) $key: Option<$type>, )*
            $($( pub(crate) $part: <$part_type as crate::layers::Settings>::Read, )*)?
        }

        impl $name {
            pub(crate) const KEYS: &[crate::group::Key] = &[$(
                crate::group::Key {
                    name: stringify!($key),
                    form: $form,
                    default: $default,
                    about: &[$($help),*],
                },
            )*];
        }

        impl crate::layers::Settings for $name {
            type Read = $read;

            fn read(reader: &mut crate::layers::Reader) -> $read {
                $read {
                    $( $key: reader.$how(stringify!($key), $parse), )*
                    $($( $part: <$part_type as crate::layers::Settings>::read(reader), )*)?
                }
            }

            fn whole(read: $read) -> Option<Self> {
                Some(Self {
                    $( $key: read.$key?, )*
                    $($( $part: crate::layers::Settings::whole(read.$part)?, )*)?
                })
            }
        }
    };
}

pub(crate) use settings;
