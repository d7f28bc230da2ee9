// The version of the plugins: bumped with every change of inputs, outputs, attributes or meaning.
//
// TensorRT keeps it in the engine and looks for a creator of exactly this version; the runtime compares it with the one
// in a bundle's manifest.
#pragma once

#define DSPARK_PLUGIN_VERSION "1"
#define DSPARK_PLUGIN_NAMESPACE "dspark"
